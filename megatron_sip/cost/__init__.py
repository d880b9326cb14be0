"""What a step costs: arithmetic, memory, time and judges, as pure functions of sizes."""
