"""The engine: one thread that owns the device, the queue in front of it, and the policy of what runs next."""
