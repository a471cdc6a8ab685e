"""Loading models that are already trained."""
