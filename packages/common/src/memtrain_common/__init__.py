"""What every memtrain method shares: data, models, one training loop, checkpoints and one way to measure memory.

Import from the modules: ``from memtrain_common.training.loop import fit``. Nothing is imported here, so that a command
which only prints its help does not load torch.
"""
