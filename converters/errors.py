"""What can be wrong with a checkpoint, each told before any weight is read."""


class UnsupportedCheckpoint(ValueError):
    """An unknown model type, a config feature that is not implemented, or no safetensors to read."""


class CheckpointMismatch(ValueError):
    """The checkpoint's tensors are not the model's: missing, surplus or misshapen."""


class NotEnoughMemory(MemoryError):
    """The weights do not fit into the memory that is free."""
