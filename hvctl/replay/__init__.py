"""A recorded trace on simulated hosts with a simulated clock, to see what a policy does before it is armed.

The decisions are those of production: decide, packing and forecasting, called with simulated facts; what a policy adds
to them (allocations that follow forecasts by themselves) is in goals. The hosts are of their own: an operation of the
engine costs milliseconds of locks and commits on the fake host too, and a trace asks for hundreds of thousands. What
lasts less than a step of five minutes (the grace, saving, starting) takes no time here. Pure: a series in, a tally out;
no file, no clock."""
