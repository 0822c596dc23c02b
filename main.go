// Timedb serves versioned time series from PostgreSQL over HTTP. A value has three times:
// valid_time, the moment that it describes; known_time, when its run knew it; change_time, when
// this version of it was written. Nothing is overwritten.
//
// cli.go makes tables and users and starts the server. A request comes in through server.go, which
// has auth.go decide whom it acts for and store.go speak SQL. schema.sql is the database's side.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"
	_ "time/tzdata" // time zones of a machine that has none
)

// memoryLimit is when Go collects garbage whatever it costs, in bytes: what requests may hold
// (memoryTotal in server.go), connections, and some room. GOMEMLIMIT in the environment wins.
const memoryLimit = 512 << 20

// garbagePercent is how much garbage there may be, in percent of what is in use, before Go collects
// it. Requests leave garbage and little else: Go's own 100 makes small reads a tenth slower. GOGC
// in the environment wins.
const garbagePercent = 400

func main() {
	time.Local = time.UTC // also of the log
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
}
