"""What is learned: the seam (task.py), one file for each task, and the head that computes its loss."""
