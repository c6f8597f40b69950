"""BitFit: what trains, on which data, and how, for one task and one frozen encoder."""
