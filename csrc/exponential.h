/* The exponential function of one number. A template like attention.h. */

/* exp(x) for x in about [-87, 88] (float) or [-708, 709] (double). Beyond, and for NaN, the result may be any number.
 * exp(x) = 2^n exp(x - n ln 2) with |x - n ln 2| <= ln 2 / 2, where a Taylor polynomial suffices; n is added to the
 * exponent's bits. Adding and subtracting ROUNDER gives the nearest integer, also found in the last bits of the sum. */
TARGET ALWAYS_INLINE real NAME(exponential_within)(real x)
{
    real shifted = x * (real)1.4426950408889634 + ROUNDER;
    real n = shifted - ROUNDER;
    real rest = (x - n * LN2_HIGH) - n * LN2_LOW;
    real sum = (real)INVERSE_FACTORIAL[EXP_DEGREE];
    UNROLL for (int degree = EXP_DEGREE - 1; degree >= 0; degree--)
        sum = sum * rest + (real)INVERSE_FACTORIAL[degree];
    bits exponent, result;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&result, &sum, sizeof result);
    result += exponent << MANTISSA_BITS;
    memcpy(&sum, &result, sizeof sum);
    return sum;
}

/* The same, and 0 below; exp(-inf) = 0, and NaN stays NaN, whatever its bits. */
TARGET ALWAYS_INLINE real NAME(exponential)(real x)
{
    real result = NAME(exponential_within)(x < EXP_LOWEST ? EXP_LOWEST : x);
    return x < EXP_LOWEST ? 0 : x == x ? result : x;
}
