"""What can be done with a model, proven on a reduced copy of it (models/reduced.py) before it is used.

analyse.py     the claims, each compared with one plain forward and backward pass
randomness.py  what is random in its forward pass, and whether that can be the same under every layout
"""
