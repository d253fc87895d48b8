"""What the generate command consists of; each mode of it is a module. Commands import these."""
