"""What the user sees after a run."""
