"""Taking part in a launch of several processes that somebody else has started, and texts that start one. What is measured is not known here."""
