"""A run on the hub: its weights, and a card that says where they come from."""
