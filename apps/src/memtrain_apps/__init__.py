"""Compose memtrain's methods: one choice on each of three axes makes a training run."""
