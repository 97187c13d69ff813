"""One step, planned once: session, plan, the phases in their order, and torch's face on top."""
