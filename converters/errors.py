"""What can be wrong with a checkpoint, told before any weight is read; of a streamed one also when a layer is read."""


class UnsupportedCheckpoint(ValueError):
    """An unknown model type, a config feature that is not implemented, or no safetensors to read."""


class CheckpointMismatch(ValueError):
    """The checkpoint's tensors are not the model's: missing, surplus or misshapen."""


class CheckpointChanged(RuntimeError):
    """A file of a streamed checkpoint is no longer what it was when the model was loaded."""


class NotEnoughMemory(MemoryError):
    """The weights do not fit into the memory that is free."""
