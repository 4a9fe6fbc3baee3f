"""The obvious slow versions that the fast ones are compared with."""
