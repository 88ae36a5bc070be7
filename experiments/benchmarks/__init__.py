"""Speed, measured as ratios: both sides in one process, interleaved. One module for each subcommand."""
