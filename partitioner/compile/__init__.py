"""partition(): from a captured program to one program per rank."""
