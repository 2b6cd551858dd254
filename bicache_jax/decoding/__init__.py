"""What runs on the device: a prefix encoded, forward passes, tokens unmasked, all inside one jitted program."""
