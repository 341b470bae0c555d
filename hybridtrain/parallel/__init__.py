"""How a stage becomes parallel: apply.py holds the order, the other files one step each."""
