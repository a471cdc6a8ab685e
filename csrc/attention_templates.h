/* What attention.c is made of, for units.h. */
#include "product.h"
#include "tile.h"
#include "attention.h"
