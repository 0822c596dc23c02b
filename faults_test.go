package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is timedb as a process of its own, which can be killed.
type program struct {
	cmd *exec.Cmd
	log *logBuffer
}

// mustProgram starts `timedb api` on a port of 127.0.0.1, and waits until it serves.
func mustProgram(t *testing.T, dsn string, port int) *program {
	t.Helper()
	p := &program{exec.Command(os.Args[0], "api", "--port", strconv.Itoa(port)), &logBuffer{}}
	p.cmd.Env = append(os.Environ(), "TEST_RUNS_THE_PROGRAM=1", "TIMEDB_DSN="+dsn)
	out := &logBuffer{}
	p.cmd.Stdout, p.cmd.Stderr = out, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	for begin := time.Now(); !servesLine.MatchString(out.String()); time.Sleep(time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatalf("timedb does not serve: %s", p.log)
		}
	}
	return p
}

func (p *program) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// freePort is one that nobody listens on, below those that Linux hands out by itself.
func freePort(t *testing.T) int {
	for range 1000 {
		port := 10_000 + rand.Intn(10_000)
		if l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("there is no free port")
	return 0
}

// cluster is a PostgreSQL of the test's own, which can be killed. Only 127.0.0.1 reaches it, and it asks for no password.
type cluster struct {
	bin, data string
	port      int
	cmd       *exec.Cmd
}

// as has cmd run as a user that PostgreSQL accepts, who is not root.
func (c *cluster) as(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = "/"
	if who, err := osuser.Lookup("postgres"); err == nil && os.Getuid() == 0 {
		uid, _ := strconv.ParseUint(who.Uid, 10, 32)
		gid, _ := strconv.ParseUint(who.Gid, 10, 32)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		os.Chown(filepath.Dir(c.data), int(uid), int(gid))
	}
	return cmd
}

// mustFolder returns a new folder that the cluster's user may enter.
func mustFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "timedb-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// mustCluster starts a cluster: an empty one, or a standby of another.
func mustCluster(t *testing.T, primary *cluster) *cluster {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("no PostgreSQL server is installed here whose processes could be killed")
	}
	c := &cluster{bin: filepath.Dir(found[len(found)-1]), data: filepath.Join(mustFolder(t), "data"), port: freePort(t)}
	make := exec.Command(c.bin+"/initdb", "-D", c.data, "-U", "timedb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8")
	if primary != nil {
		make = exec.Command(c.bin+"/pg_basebackup", "-D", c.data, "-R", "-c", "fast", "-d", primary.dsn())
	}
	if out, err := c.as(make).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v %s", make.Args, err, out)
	}
	t.Cleanup(c.kill)
	c.mustStart(t)
	return c
}

func (c *cluster) dsn() string {
	return fmt.Sprintf("postgresql://timedb@127.0.0.1:%d/postgres?sslmode=disable", c.port)
}

// mustStart starts PostgreSQL and waits until it answers. What is left of a killed one may keep it from starting for a moment.
func (c *cluster) mustStart(t *testing.T) {
	t.Helper()
	db := mustOpen(t, c.dsn())
	for begin := time.Now(); time.Since(begin) < time.Minute; {
		var log bytes.Buffer
		c.cmd = c.as(exec.Command(c.bin+"/postgres", "-D", c.data, "-p", strconv.Itoa(c.port), "-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=", "-c", "max_connections=100"))
		c.cmd.Stderr = &log
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { c.cmd.Wait(); close(ended) }()
		for waiting := true; waiting; {
			select {
			case <-ended:
				waiting = false
			case <-time.After(5 * time.Millisecond):
				if db.Ping() == nil {
					return
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("PostgreSQL does not start")
}

func (c *cluster) kill() { c.cmd.Process.Kill() }

// proxy stands between timedb and PostgreSQL. It can cut all connections, and freeze them and those to come.
type proxy struct {
	dsn string
	mu  sync.RWMutex // held for writing: frozen
	all sync.Map     // of net.Conn
}

func mustProxy(t *testing.T, dsn string) *proxy {
	t.Helper()
	u := mustParse(t, dsn)
	target := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	u.Host = listener.Addr().String()
	p := &proxy{dsn: u.String()}
	pass := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		for buf := make([]byte, 4096); ; {
			n, err := from.Read(buf)
			p.mu.RLock()
			if err == nil {
				_, err = to.Write(buf[:n])
			}
			p.mu.RUnlock()
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			database, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			p.all.Store(client, nil)
			go pass(client, database)
			go pass(database, client)
		}
	}()
	return p
}

func (p *proxy) cut() {
	p.all.Range(func(conn, _ any) bool {
		p.all.Delete(conn)
		conn.(net.Conn).Close()
		return true
	})
}

func TestFaultClientThatHangsUpIsNoErrorInTheLog(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1")))
	tx, err := s.db.Begin()
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE values_table`)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	ctx, hangUp := context.WithTimeout(context.Background(), time.Second)
	defer hangUp()
	r, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/values", nil)
	r.Header.Set("X-API-Key", key)
	if _, err := s.client.Do(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`level=(\w+) msg=request method=GET path=/values status=503`)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if found := line.FindStringSubmatch(s.log.String()); found != nil && found[1] == "INFO" {
			return
		} else if found != nil || time.Now().After(deadline) {
			t.Fatalf("the log has %q", s.log)
		}
	}
}

func TestFaultHealthAnswersWhileEveryLookupWaits(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	tx, err := s.db.Begin()
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE users_table`)
	}
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer tx.Rollback()
	for range 8 * lookupPool {
		all.Go(func() { s.do("GET", "/values", key, "") })
	}
	for deadline := time.Now().Add(time.Minute); mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`) != fmt.Sprint(lookupPool); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the lookups do not wait")
		}
	}
	s.must(t, 200, "GET", "/healthz", "", "")
}

func TestFaultFrozenDatabaseIsGivenUpWithinItsConnectTimeout(t *testing.T) {
	t.Parallel()
	p := mustProxy(t, mustDatabase(t))
	st, err := openStore(p.dsn+"&connect_timeout=1", "public", statementTimeout, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer st.db.Close()
	p.mu.Lock() // it accepts, and says nothing
	defer p.mu.Unlock()
	failed := make(chan error, 1)
	go func() { failed <- st.db.Ping() }()
	select {
	case err := <-failed:
		if err == nil || !unavailable(err) {
			t.Errorf("Ping: %v", err)
		}
	case <-time.After(30 * time.Second): // and not after statementTimeout
		t.Error("it still waits to be connected")
	}
}

// ledger remembers what servers have acknowledged, to compare it to what is stored.
type ledger struct {
	servers []*testServer
	key     string
	mu      sync.Mutex
	runs    map[string]int // acknowledged runs, and how many rows they have
	notes   map[string]bool
	other   map[string]int // answers that are neither 200 nor 503
	counts  [3]int         // 200, 503, no answer
}

const ledgerRows = 2400 // of a run: three blocks

// mustLedger prepares what the work needs, a series whose values can be corrected. The tables and users are made through dsn.
func mustLedger(t *testing.T, servers ...*testServer) *ledger {
	t.Helper()
	l := &ledger{servers: servers, runs: map[string]int{}, notes: map[string]bool{}, other: map[string]int{}}
	l.key = servers[0].mustUser(t, tenantA, "ledger@example.com")
	servers[0].must(t, 200, "POST", "/upload", l.key, runWith("", at("2025-01-01", "1"), at("2025-01-02", "1"), at("2025-01-03", "1")))
	return l
}

// send notes how one request ends, and returns whether it was acknowledged.
func (l *ledger) send(t *testing.T, s *testServer, method, path, body string, header ...string) bool {
	resp, text, err := s.do(method, path, l.key, body, header...)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.counts[2]++
	case resp.StatusCode == 200:
		l.counts[0]++
		return true
	case resp.StatusCode == 503:
		l.counts[1]++
		if resp.Header.Get("Retry-After") == "" {
			t.Errorf("503 without Retry-After: %s", text)
		}
	default:
		l.other[fmt.Sprint(resp.StatusCode, " ", text)]++
	}
	return false
}

// work uploads, uploads again until it is acknowledged, corrects and reads, until ctx is done.
func (l *ledger) work(ctx context.Context, t *testing.T, clients int) *sync.WaitGroup {
	var all sync.WaitGroup
	for client := range clients {
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				s := l.servers[(client+n)%len(l.servers)]
				run := fmt.Sprintf("%08x-0000-4000-8000-%012x", client, rand.Int63n(1<<47))
				note := "beside " + run
				csv := []byte("valid_time,value_key,value\n")
				for i := range ledgerRows {
					csv = fmt.Appendf(csv, "2025-02-01T%02d:%02d:%02dZ,s%d,%d\n", i/3600, i/60%60, i%60, client%3, n)
				}
				upload := func() bool {
					return l.send(t, s, "POST", "/upload?run_start_time=2025-01-01&run_id="+run, string(csv), "Content-Type: text/csv")
				}
				stored := false
				switch n % 4 {
				case 0:
					stored = upload()
				case 1:
					for end := time.Now().Add(time.Minute); !stored && time.Now().Before(end); { // also after ctx is done
						stored = upload()
						time.Sleep(10 * time.Millisecond)
					}
				case 2:
					update := fmt.Sprintf(`{"updates":[{"valid_time":"2025-01-0%d","series_key":"load","value":%d,"annotation":%q}]}`, 1+n%3, n, note)
					acknowledged := l.send(t, s, "PUT", "/values", update)
					l.mu.Lock()
					l.notes[note] = acknowledged
					l.mu.Unlock()
				case 3:
					l.send(t, s, "GET", "/values?series_key=load", "")
				}
				if stored || n%4 == 1 {
					l.mu.Lock()
					l.runs[run] = ledgerRows
					l.mu.Unlock()
				}
			}
		})
	}
	return &all
}

// check compares what was acknowledged to what is stored: every acknowledged run once and whole, none in part, every
// acknowledged correction once, none twice.
func (l *ledger) check(t *testing.T, db *sql.DB) {
	t.Helper()
	if len(l.other) > 0 {
		t.Errorf("answers that are neither 200 nor 503: %v", l.other)
	}
	rows, err := db.Query(`SELECT r.run_id, r.rows_inserted, coalesce(sum(cardinality(v."values")) FILTER (WHERE v.version = 1), 0)
		FROM runs_table r LEFT JOIN values_table v ON v.tenant_id = r.tenant_id AND v.run_id = r.run_id GROUP BY 1, 2`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var run string
		var said, stored int
		if err := rows.Scan(&run, &said, &stored); err != nil {
			t.Fatal(err)
		}
		if said != stored {
			t.Errorf("run %s has %d of its %d rows", run, stored, said)
		}
		delete(l.runs, run)
	}
	if len(l.runs) > 0 {
		t.Errorf("%d acknowledged runs are lost", len(l.runs))
	}
	var stored map[string]int
	if err := json.Unmarshal([]byte(mustQuery(t, db, `SELECT coalesce(json_object_agg(annotation, n), '{}') FROM (
		SELECT annotation, count(*) AS n FROM values_table WHERE annotation IS NOT NULL GROUP BY 1) AS t`)), &stored); err != nil {
		t.Fatal(err)
	}
	for note, acknowledged := range l.notes {
		if count := stored[note]; acknowledged && count != 1 || count > 1 {
			t.Errorf("a correction, acknowledged: %v, is there %d times", acknowledged, count)
		}
	}
	t.Logf("%d requests were acknowledged, %d got 503, %d no answer", l.counts[0], l.counts[1], l.counts[2])
	if l.counts[0] == 0 {
		t.Error("nothing was acknowledged")
	}
}

// serverAt is a server that listens on a port, whoever it is.
func serverAt(t *testing.T, dsn string, port int) *testServer {
	s := &testServer{url: fmt.Sprintf("http://127.0.0.1:%d", port), dsn: dsn, db: mustOpen(t, dsn), log: &logBuffer{}}
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: time.Minute}
	return s
}

func TestFaultKilledServerLosesNothing(t *testing.T) {
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProgram(t, asAppRole(dsn), port)
	s := serverAt(t, dsn, port)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range 5 * *faults {
		time.Sleep(time.Duration(50+rand.Intn(200)) * time.Millisecond)
		p.kill()
		p = mustProgram(t, asAppRole(dsn), port)
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
}

func TestFaultKilledDatabaseLosesNothing(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	mustRun(t, 0, c.dsn(), "", "create", "tables", "--with-users", "-y")
	port := freePort(t)
	mustProgram(t, c.dsn(), port)
	s := serverAt(t, c.dsn(), port)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range *faults {
		time.Sleep(time.Duration(300+rand.Intn(500)) * time.Millisecond)
		c.kill()
		for range 3 {
			resp, text, err := s.do("GET", "/values?series_key=load", l.key, "")
			if err != nil || resp.StatusCode != 503 && resp.StatusCode != 200 { // 200: the last of PostgreSQL's processes still answered
				t.Errorf("without a database: %v %v %s", err, resp, text)
			}
		}
		c.mustStart(t)
		returned := time.Now()
		for !l.send(t, s, "GET", "/values?series_key=load", "") {
			if time.Since(returned) > 2*time.Second {
				t.Error("no service two seconds after the database's return")
				break
			}
		}
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
	if l.counts[1] == 0 {
		t.Error("there was no 503: was the database killed?")
	}
}

func TestFaultCutConnectionsLoseNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range 15 * *faults {
		time.Sleep(time.Duration(20+rand.Intn(150)) * time.Millisecond)
		p.cut()
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
}

func TestFaultFrozenDatabaseIs503AndThenServesAgain(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	s.client.Timeout = 4 * lookupTimeout
	p.mu.Lock() // nothing is forwarded any more, nor are connections ended
	var all sync.WaitGroup
	for _, path := range []string{"/values", "/healthz", "/runs", "/list_timeseries", "/values?series_key=load"} {
		all.Go(func() {
			if resp, text, err := s.do("GET", path, l.key, ""); err != nil || resp.StatusCode != 503 {
				t.Errorf("GET %s of a frozen database: %v %v %s", path, err, resp, text)
			}
		})
	}
	all.Wait()
	p.mu.Unlock()
	for begin := time.Now(); !l.send(t, s, "GET", "/values?series_key=load", ""); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatal("no service after the database goes on")
		}
	}
	s.must(t, 200, "GET", "/healthz", "", "")
}

// mustLockValues makes every statement on values_table wait until the function that it returns is called.
func (s *testServer) mustLockValues(t *testing.T) (unlock func()) {
	t.Helper()
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec("LOCK TABLE values_table"); err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

func TestFaultFullPoolIs503AndKeysAreStillJudged(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	unlock := s.mustLockValues(t)
	var all sync.WaitGroup
	for range poolSize + 20 {
		all.Go(func() { l.send(t, s, "GET", "/values?series_key=load", "") })
	}
	for busy := ""; busy != strconv.Itoa(poolSize); time.Sleep(5 * time.Millisecond) {
		busy = mustQuery(t, s.db, `SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'values_table'::regclass`)
	}
	s.must(t, 200, "GET", "/healthz", "", "")
	s.must(t, 401, "GET", "/values", "", "")
	for l.full() < 20 { // the 20 that got no connection
		time.Sleep(10 * time.Millisecond)
	}
	unlock()
	all.Wait()
	if l.counts != [3]int{poolSize, 20, 0} || len(l.other) > 0 {
		t.Errorf("%v of 200, 503 and none, and %v", l.counts, l.other)
	}
}

// full is how many requests got 503 so far.
func (l *ledger) full() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts[1]
}

func TestFaultStandbyServesReadsAndRefusesWrites(t *testing.T) {
	t.Parallel()
	primary := mustCluster(t, nil)
	mustRun(t, 0, primary.dsn(), "", "create", "tables", "--with-users", "-y")
	l := mustLedger(t, mustAPIOn(t, primary.dsn(), primary.dsn()))
	standby := mustCluster(t, primary)
	s := mustAPIOn(t, standby.dsn(), standby.dsn())
	s.must(t, 200, "GET", "/healthz", "", "")
	if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", l.key, "")); got.Count != 3 {
		t.Errorf("the standby shows %d values, want 3", got.Count)
	}
	for _, request := range [][3]string{{"POST", "/upload", runWith("", at("2025-01-01", "1"))}, {"POST", "/series", `{"name":"new"}`},
		{"PUT", "/values", `{"updates":[{"valid_time":"2025-01-01","series_key":"load","value":2}]}`}} {
		s.must(t, 503, request[0], request[1], l.key, request[2])
	}
}

func TestFaultEndedStatementIs503AndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	unlock := s.mustLockValues(t)
	done := make(chan bool)
	go func() { done <- l.send(t, s, "POST", "/upload", runWith("", at("2025-02-01", "1"))) }()
	for ended := ""; ended != "1"; time.Sleep(5 * time.Millisecond) { // as statement_timeout ends it, with SQLSTATE 57014
		ended = mustQuery(t, s.db, `SELECT count(*) FROM (SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted
			AND relation = 'values_table'::regclass) AS x`)
	}
	if <-done || l.counts[1] != 1 {
		t.Errorf("an upload whose statement was ended: %v %v", l.counts, l.other)
	}
	unlock()
	if got := s.stored(t); !strings.HasPrefix(got, "1 ") {
		t.Errorf("stored %q", got)
	}
}

func TestFaultFullDiskIs503AndStoresNothingInPart(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	disk := mustFolder(t)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=24m", "none", disk).CombinedOutput(); err != nil {
		t.Skipf("a small disk cannot be mounted here: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", disk).Run() })
	if out, err := exec.Command("chown", "--reference", c.data, disk).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	owner := mustOpen(t, c.dsn())
	mustExec(t, owner, "CREATE TABLESPACE small LOCATION '"+disk+"'")
	mustExec(t, owner, "CREATE DATABASE small TABLESPACE small")
	dsn := strings.Replace(c.dsn(), "/postgres", "/small", 1)
	mustRun(t, 0, dsn, "", "create", "tables", "--with-users", "-y")
	s := mustAPIOn(t, dsn, dsn)
	l := mustLedger(t, s)
	_, csv := uploadBodies(10_000)
	upload := func() bool {
		return l.send(t, s, "POST", "/upload?run_start_time=2025-01-01", csv, "Content-Type: text/csv")
	}
	for n := 0; upload(); n++ {
		if n == 1000 {
			t.Fatal("the disk is never full")
		}
	}
	if l.counts[1] != 1 {
		t.Errorf("on a full disk: %v %v", l.counts, l.other)
	}
	s.must(t, 200, "GET", "/values?series_key=load", l.key, "")
	if out, err := exec.Command("mount", "-o", "remount,size=200m", disk).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if !upload() {
		t.Errorf("after the disk was enlarged: %v", l.other)
	}
	l.check(t, s.db)
}

func TestFaultOverloadIsAnsweredAndPasses(t *testing.T) {
	s := mustServer(t)
	l := mustLedger(t, s)
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000}, Timeout: time.Minute}
	csvBody, _ := uploadBodies(20_000)
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(*faults)*3*time.Second)
	defer stop()
	var all sync.WaitGroup
	for client := range 100 + 45**faults {
		all.Go(func() {
			for n := client; ctx.Err() == nil; n++ {
				switch n % 10 {
				case 0:
					l.send(t, s, "POST", "/upload", csvBody)
				case 1:
					l.send(t, s, "GET", "/values", "")
				default:
					l.send(t, s, "GET", "/values?series_key=load", "")
				}
			}
		})
	}
	probe := &http.Client{Timeout: 30 * time.Second}
	for ctx.Err() == nil {
		for _, path := range []string{"/healthz", "/"} {
			if resp, err := probe.Get(s.url + path); err != nil || resp.StatusCode != 200 {
				t.Errorf("GET %s under load: %v %v", path, resp, err)
			} else {
				resp.Body.Close()
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	all.Wait()
	if len(l.other) > 0 || l.counts[0] == 0 || l.counts[2] > 0 {
		t.Errorf("%v of 200, 503 and no answer; others: %v", l.counts, l.other)
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("%v of 200, 503 and no answer; %d MiB from the system", l.counts, memory.Sys>>20)
	if memory.Sys > 2<<30 { // the clients' is in it
		t.Errorf("%d MiB from the system", memory.Sys>>20)
	}
	s.must(t, 200, "GET", "/values?series_key=load", l.key, "") // at once
}

func TestFaultSoakGrowsNothing(t *testing.T) {
	s := mustServer(t)
	l := mustLedger(t, s)
	state := func() (goroutines int, connections string, heap uint64) {
		s.client.CloseIdleConnections()
		time.Sleep(300 * time.Millisecond)
		runtime.GC()
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		return runtime.NumGoroutine(), mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND usename = $1`, appRole.name), memory.HeapAlloc
	}
	for _, part := range []int{1, 9} { // the first fills pools and caches
		ctx, stop := context.WithTimeout(context.Background(), time.Duration(part**faults**faults)*150*time.Millisecond)
		before, connections, heap := state()
		l.work(ctx, t, 8).Wait()
		stop()
		if part > 1 {
			l.check(t, s.db)
			l.runs, l.notes = map[string]int{}, map[string]bool{} // or the ledger is what grows, or the log, which is in this process
			s.log.mu.Lock()
			s.log.buf = bytes.Buffer{}
			s.log.mu.Unlock()
		}
		after, connectionsAfter, heapAfter := state()
		t.Logf("goroutines %d → %d, connections %s → %s, heap %d → %d KiB", before, after, connections, connectionsAfter, heap>>10, heapAfter>>10)
		if many, _ := strconv.Atoi(connectionsAfter); part > 1 && (after > before+10 || many > poolSize+lookupPool+1 || heapAfter > heap+16<<20) {
			t.Error("something grows")
		}
	}
}

func TestFaultSIGTERMUnderLoadLosesNoAcknowledgedWrite(t *testing.T) { // S30
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	s := serverAt(t, dsn, port)
	s.client.Transport = &http.Transport{DisableKeepAlives: true} // so that no connection is closed for being idle
	var l *ledger
	for range *faults {
		p := mustProgram(t, asAppRole(dsn), port)
		if l == nil {
			l = mustLedger(t, s)
		}
		ctx, stop := context.WithCancel(context.Background())
		served := l.counts[0]
		clients := l.work(ctx, t, 8)
		time.Sleep(time.Duration(300+rand.Intn(300)) * time.Millisecond)
		stop() // what is on its way then, ends; what is retried, ends with the next server
		begin := time.Now()
		p.cmd.Process.Signal(syscall.SIGTERM)
		if err := p.cmd.Wait(); err != nil || time.Since(begin) > drainTimeout+5*time.Second {
			t.Errorf("after SIGTERM: %v, in %s", err, time.Since(begin))
		}
		next := mustProgram(t, asAppRole(dsn), port)
		clients.Wait()
		logged := strings.Count(p.log.String(), "status=200") + strings.Count(next.log.String(), "status=200")
		if served == 0 {
			logged-- // the upload of the ledger itself
		}
		if answered := l.counts[0] - served; answered != logged {
			t.Errorf("%d requests were served, and %d answers arrived", logged, answered)
		}
		next.kill()
	}
	l.check(t, s.db)
}

func TestFaultTwoServersActAsOne(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	servers := []*testServer{mustAPI(t, dsn), mustAPI(t, dsn)}
	l := mustLedger(t, servers...)
	for n := range 10 * *faults {
		var all sync.WaitGroup
		run := fmt.Sprintf(`"run_id":"00000000-0000-4000-8000-%012x",`, n)
		answers := make([]string, 8)
		for i := range answers { // the same request at once, of a series that is new
			all.Go(func() {
				answers[i] = servers[i%2].must(t, 200, "POST", "/upload", l.key, strings.Replace(runWith(run, at("2025-01-01", "1")), `"load"`, fmt.Sprintf(`"new %d"`, n), 1))
			})
		}
		all.Wait()
		if slices.Sort(answers); answers[0] != answers[7] {
			t.Errorf("%s and %s", answers[0], answers[7])
		}
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(*faults)*time.Second)
	defer stop()
	l.work(ctx, t, 8).Wait()
	l.check(t, servers[0].db)
	if got := mustQuery(t, servers[0].db, `SELECT count(*) FROM (SELECT FROM values_table WHERE version > 1 GROUP BY series_id, run_id,
		valid_from, version HAVING count(*) > 1) AS twice`); got != "0" {
		t.Errorf("%s versions were given twice", got)
	}
}

func TestDumpAndRestoreAnswersTheSame(t *testing.T) {
	t.Parallel()
	dsn, copied := mustDatabase(t), mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	l := mustLedger(t, mustAPI(t, dsn))
	ctx, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	l.work(ctx, t, 4).Wait()
	if out, err := exec.Command("bash", "-c", `pg_dump "$0" | psql -qX -v ON_ERROR_STOP=1 "$1"`, dsn, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	restored := mustAPI(t, copied)
	for _, path := range []string{"/values", "/values?mode=overlapping&all_versions=true", "/runs", "/list_timeseries",
		"/values?format=csv&as_of=" + time.Now().UTC().Format("2006-01-02T15:04:05.000Z")} {
		if before, after := l.servers[0].must(t, 200, "GET", path, l.key, ""), restored.must(t, 200, "GET", path, l.key, ""); before != after {
			t.Errorf("GET %s differs after a restore", path)
		}
	}
	restored.must(t, 200, "POST", "/upload", l.key, runWith("", at("2025-03-01", "1")))
}

func TestStoppingServerFinishesWhatItBegan(t *testing.T) { // S30
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 4
	var began, ended sync.WaitGroup
	stopped := make(chan struct{})
	began.Add(n)
	for i := range n {
		ended.Go(func() {
			in, out := io.Pipe()
			go func() {
				// The client sends the body only after the server asked for it: then the handler is reading.
				io.WriteString(out, `{"run_start_time":"2025-01-01",`)
				began.Done()
				<-stopped
				io.WriteString(out, `"value_rows":[`+strings.Replace(at("2025-01-01", "1"), "load", "s"+strconv.Itoa(i), 1)+`]}`)
				out.Close()
			}()
			r, _ := http.NewRequest("POST", s.url+"/upload", in)
			r.Header = http.Header{"X-Api-Key": {key}, "Content-Type": {"application/json"}, "Expect": {"100-continue"}}
			resp, err := s.client.Do(r)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("a request that had begun: %v %v", resp, err)
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		})
	}
	began.Wait()
	code := make(chan int)
	go func() { code <- s.stop() }()
	for { // once nobody is let in any more, the server is stopping
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			break
		}
		conn.Close()
		time.Sleep(time.Millisecond)
	}
	close(stopped)
	ended.Wait()
	if got := <-code; got != 0 {
		t.Errorf("exit %d after a stop, want 0", got)
	}
	if got := s.stored(t); got != "4 4 4 4" {
		t.Errorf("stored %q, want every acknowledged upload", got)
	}
}

func TestAbandonedAndTruncatedUploadsStoreNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith("", at("2025-01-01", "1"))
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", key, len(body)+10, body)
	conn.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
	if got := s.stored(t); got != "0 0 0" {
		t.Errorf("a body that ended too early stored %q", got)
	}
}
