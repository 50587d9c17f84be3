"""One folder per operation: api, reference (the meaning), and its implementations."""
