"""Plans a run before anything is allocated: layout, batch and memory. No torch."""
