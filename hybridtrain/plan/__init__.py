"""What a run will be, computed before anything is allocated: layout, batch and memory. No torch."""
