"""The Llama policy on megatron-core: builder, attention, reference."""
