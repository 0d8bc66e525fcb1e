"""What commands share: flags, presets, errors as one sentence, the session around a training."""
