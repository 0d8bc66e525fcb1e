"""The three axes (train, save, optim) as plain code: inject, save, build."""
