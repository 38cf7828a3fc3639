"""Stage heal: trains a compressed model towards its dense one."""
