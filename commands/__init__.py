"""The commands by the room that they serve: each parses, calls one function, prints, and exits. No logic."""
