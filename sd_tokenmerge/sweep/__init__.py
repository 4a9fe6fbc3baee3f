"""Generate and measure across methods and keep rates, in a folder that can be resumed."""
