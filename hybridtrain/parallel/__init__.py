"""Makes a pipeline stage parallel: apply.py applies the transforms in order, the other
files contain one each.
"""
