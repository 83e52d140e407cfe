"""The programs that train: the only place with `backward()` and optimizers."""
