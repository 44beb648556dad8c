#define ISA neon
#define BYTES 16
#define TILE_ROWS 6
#include "isa.inc"
