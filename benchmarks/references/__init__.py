"""What the query strategies are compared with by acquisition.py: plain NumPy forms, other libraries, and the checks."""
