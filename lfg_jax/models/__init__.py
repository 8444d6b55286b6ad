"""Networks whose activities are tapped."""
