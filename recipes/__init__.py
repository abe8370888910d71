"""The recipes that ship with prefopt."""
