"""Networks with tapped activities."""
