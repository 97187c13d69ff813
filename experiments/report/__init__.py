"""Tables, figures and pages made of recorded runs."""
