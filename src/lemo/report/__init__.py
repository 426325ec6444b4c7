"""Tables, plots and pages made from Records; nothing is measured here."""
