"""The hooked model, readable top to bottom: `hooked_moe`, `block`, `attention`, `moe`, `norm`, `rotary`."""
