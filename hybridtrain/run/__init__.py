"""A run on disk: its directory and identity, who may write to it, and the trackers that its metrics go to."""
