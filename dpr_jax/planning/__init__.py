"""Plans of a run on machines that are not there: memory, traffic and bounds from the compiler."""
