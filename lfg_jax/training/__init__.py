"""From a config to a trained network: rules, algorithms, the step, the loop."""
