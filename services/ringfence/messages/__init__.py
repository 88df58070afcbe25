"""Every message and topic of Ringfence, declared once: the contract between the parts."""
