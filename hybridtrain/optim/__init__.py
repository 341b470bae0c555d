"""The update: parameter groups and the optimizer, and the learning rate as a function of the step."""
