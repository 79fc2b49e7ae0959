"""The scheduler on a virtual clock: `cellc simulate`."""
