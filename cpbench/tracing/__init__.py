"""Where the time of a rank goes: named spans, and what tools make of them. What is measured without a tool is in measure/."""
