"""The folder of a run: what lies where, how far it is, what its files say."""
