"""How a head's blocks are chosen: one policy a file, all behind one interface (`base`)."""
