"""What a layout would take on devices that are not at hand: each rank's program as it is, its collectives priced, all ranks played out."""
