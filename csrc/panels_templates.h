/* What panels.c is made of, for units.h. */
#include "product.h"
#include "panels.h"
