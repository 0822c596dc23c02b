package main

// This file covers what happens when something breaks under timedb or around it. Processes of timedb and PostgreSQL are
// killed, connections are cut or frozen, statements wait or are ended, a disk is full, clients leave, and too many
// clients come. Nothing that was acknowledged may be lost, doubled or stored in part. A request that cannot be served
// gets 503.
//
// The tests whose names begin with TestFault run for a moment here. script/faults runs them for longer, with -faults.

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
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
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const aRead = "/values?series_key=load" // a small read of what mustLedger uploads

// sleepAtRandom sleeps for between least and most milliseconds. It has no condition to wait for: a fault must strike
// at a moment that nobody chose.
func sleepAtRandom(least, most int) {
	time.Sleep(time.Duration(least+rand.Intn(most-least)) * time.Millisecond)
}

// mustSucceed runs a command of the system.
func mustSucceed(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v %s", cmd.Args, err, out)
	}
}

// rowOf is a row of the named series.
func rowOf(series string) string {
	return strings.Replace(at("2025-01-01", "1"), `"load"`, strconv.Quote(series), 1)
}

// ---- The ledger: clients at work, and what they were promised

// ledger remembers what servers have acknowledged, to compare it to what is stored.
type ledger struct {
	servers []*testServer
	key     string

	mu     sync.Mutex // guards what follows
	counts outcomes
	other  map[string]int  // answers that are neither 200 nor 503
	runs   map[string]int  // the runs that must be stored, and how many rows each has
	notes  map[string]bool // the corrections that were sent, by their annotation: whether they were acknowledged
}

// outcomes counts requests by how they ended: with 200, with 503, or without an answer.
type outcomes struct {
	acknowledged, unavailable, unanswered int
}

const ledgerRows = 2400 // of a run: three blocks

// mustLedger makes a user and a series whose values can be corrected.
func mustLedger(t *testing.T, servers ...*testServer) *ledger {
	t.Helper()
	l := &ledger{servers: servers, other: map[string]int{}}
	l.forget()
	l.key = servers[0].mustUser(t, tenantA, "ledger@example.com")
	threeDays := runWith("", at("2025-01-01", "1"), at("2025-01-02", "1"), at("2025-01-03", "1"))
	servers[0].must(t, 200, "POST", "/upload", l.key, threeDays)
	return l
}

// forget drops the runs and corrections that the ledger remembers.
func (l *ledger) forget() {
	l.runs = map[string]int{}
	l.notes = map[string]bool{}
}

// send counts how one request ends, and returns whether it was acknowledged.
func (l *ledger) send(t *testing.T, s *testServer, method, path, body string, header ...string) bool {
	resp, text, err := s.do(method, path, l.key, body, header...)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.counts.unanswered++
	case resp.StatusCode == 200:
		l.counts.acknowledged++
		return true
	case resp.StatusCode == 503:
		l.counts.unavailable++
		if resp.Header.Get("Retry-After") == "" {
			t.Errorf("503 without Retry-After: %s", text)
		}
	default:
		l.other[fmt.Sprint(resp.StatusCode, " ", text)]++
	}
	return false
}

// sendCSV uploads a CSV. more is a further part of the query.
func (l *ledger) sendCSV(t *testing.T, s *testServer, more, body string) bool {
	return l.send(t, s, "POST", "/upload?run_start_time=2025-01-01"+more, body, "Content-Type: text/csv")
}

// unavailable is how many requests got 503 so far.
func (l *ledger) unavailable() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts.unavailable
}

// work starts clients that upload, correct and read until ctx is done. Its caller waits for them.
func (l *ledger) work(ctx context.Context, t *testing.T, clients int) *sync.WaitGroup {
	var all sync.WaitGroup
	for client := range clients {
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				s := l.servers[(client+n)%len(l.servers)]
				id := fmt.Sprintf("%08x-0000-4000-8000-%012x", client, rand.Int63n(1<<47))
				switch n % 4 {
				case 0:
					l.upload(t, s, id, ledgerCSV(client, n))
				case 1:
					l.uploadUntilAcknowledged(t, s, id, ledgerCSV(client, n))
				case 2:
					l.correct(t, s, "beside "+id, n)
				case 3:
					l.send(t, s, "GET", aRead, "")
				}
			}
		})
	}
	return &all
}

// workFor has clients at work for some time.
func (l *ledger) workFor(t *testing.T, clients int, duration time.Duration) {
	ctx, stop := context.WithTimeout(context.Background(), duration)
	defer stop()
	l.work(ctx, t, clients).Wait()
}

// workWhile has six clients at work until disturb has returned.
func (l *ledger) workWhile(t *testing.T, disturb func()) {
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	defer clients.Wait() // deferred, because disturb may end the test
	defer stop()
	disturb()
}

// ledgerCSV is the body of an upload of ledgerRows rows.
func ledgerCSV(client, value int) string {
	body := []byte("valid_time,value_key,value\n")
	for i := range ledgerRows {
		hour, minute, second := i/3600, i/60%60, i%60
		body = fmt.Appendf(body, "2025-02-01T%02d:%02d:%02dZ,s%d,%d\n", hour, minute, second, client%3, value)
	}
	return string(body)
}

// upload tries once. A run that is not acknowledged may be stored or not.
func (l *ledger) upload(t *testing.T, s *testServer, id, body string) {
	if l.sendCSV(t, s, "&run_id="+id, body) {
		l.mustHave(id)
	}
}

// uploadUntilAcknowledged sends the same run until it is acknowledged, for a minute at most. It goes on after the ctx of
// work is done. The run must then be stored.
func (l *ledger) uploadUntilAcknowledged(t *testing.T, s *testServer, id, body string) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if l.sendCSV(t, s, "&run_id="+id, body) {
			break
		}
		time.Sleep(10 * time.Millisecond) // only the next try can tell whether the server is back
	}
	l.mustHave(id)
}

// mustHave notes that a run has to be stored.
func (l *ledger) mustHave(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.runs[id] = ledgerRows
}

func (l *ledger) correct(t *testing.T, s *testServer, note string, value int) {
	body := fmt.Sprintf(`{"updates":[{"valid_time":"2025-01-0%d","series_key":"load","value":%d,"annotation":%q}]}`,
		1+value%3, value, note)
	acknowledged := l.send(t, s, "PUT", "/values", body)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes[note] = acknowledged
}

// check compares what was acknowledged to what is stored, once no client is at work any more.
func (l *ledger) check(t *testing.T, db *sql.DB) {
	t.Helper()
	t.Logf("requests by how they ended: %+v", l.counts)
	if l.counts.acknowledged == 0 {
		t.Error("nothing was acknowledged")
	}
	if len(l.other) > 0 {
		t.Errorf("answers that are neither 200 nor 503: %v", l.other)
	}
	l.checkRuns(t, db)
	l.checkCorrections(t, db)
}

// checkRuns fails unless every acknowledged run is stored, and every stored run is whole.
func (l *ledger) checkRuns(t *testing.T, db *sql.DB) {
	t.Helper()
	rows, err := db.Query(`
		SELECT r.run_id, r.rows_inserted, coalesce(sum(cardinality(v."values")) FILTER (WHERE v.version = 1), 0)
		FROM runs_table r LEFT JOIN value_blocks v ON v.tenant_id = r.tenant_id AND v.run_id = r.run_id
		GROUP BY 1, 2`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	found := map[string]bool{}
	for rows.Next() {
		var id string
		var said, stored int
		if err := rows.Scan(&id, &said, &stored); err != nil {
			t.Fatal(err)
		}
		found[id] = true
		if said != stored {
			t.Errorf("run %s has %d of its %d rows", id, stored, said)
		}
		if sent, known := l.runs[id]; known && sent != stored {
			t.Errorf("run %s has %d of the %d rows that were sent", id, stored, sent)
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	lost := 0
	for id := range l.runs {
		if !found[id] {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d acknowledged runs are lost", lost)
	}
}

// checkCorrections fails unless every acknowledged correction is stored once, and no other more than once.
func (l *ledger) checkCorrections(t *testing.T, db *sql.DB) {
	t.Helper()
	counts := mustQuery(t, db, `SELECT coalesce(json_object_agg(annotation, n), '{}') FROM (
		SELECT annotation, count(*) AS n FROM values_table WHERE annotation IS NOT NULL GROUP BY 1) AS t`)
	stored := mustDecode[map[string]int](t, counts)
	for note, acknowledged := range l.notes {
		count := stored[note]
		if count > 1 {
			t.Errorf("a correction is stored %d times", count)
		}
		if count == 0 && acknowledged {
			t.Error("an acknowledged correction is lost")
		}
	}
}

// ---- timedb is killed, is stopped, or runs twice

// program is timedb as a process of its own, which can be killed.
type program struct {
	cmd *exec.Cmd
	log *logBuffer
}

// mustProgram starts `timedb api` on a port of 127.0.0.1, and waits until it serves.
func mustProgram(t *testing.T, dsn string, port int, args ...string) *program {
	t.Helper()
	return mustProgramWith(t, nil, dsn, port, args...)
}

// mustProgramWith does so with some more environment.
func mustProgramWith(t *testing.T, env []string, dsn string, port int, args ...string) *program {
	t.Helper()
	args = append([]string{"api", "--port", strconv.Itoa(port)}, args...)
	p := &program{exec.Command(os.Args[0], args...), &logBuffer{}}
	p.cmd.Env = append(os.Environ(), "TEST_RUNS_THE_PROGRAM=1", "TIMEDB_DSN="+dsn)
	p.cmd.Env = append(p.cmd.Env, env...)
	out := &logBuffer{}
	p.cmd.Stdout, p.cmd.Stderr = out, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the end of timedb's log: %s", tail(p.log))
		}
	})
	waitUntil(t, "timedb serves", func() bool { return servesLine.MatchString(out.String()) })
	return p
}

// tail is the end of a log, which may be long.
func tail(log *logBuffer) string {
	text := log.String()
	return text[max(0, len(text)-4000):]
}

// kill ends the process at once. Afterwards its log is complete.
func (p *program) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// portsInUse are those that freePort has given out: a test that starts its program again needs its own.
var portsInUse sync.Map

// freePort is a port that nobody listens on, below those that Linux hands out by itself.
func freePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 10_000 + rand.Intn(10_000)
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			continue
		}
		l.Close()
		if _, taken := portsInUse.LoadOrStore(port, true); !taken {
			return port
		}
	}
	t.Fatal("there is no free port")
	return 0
}

// serverAt is the server that listens on a port, which need not be the same process all the time.
func serverAt(t *testing.T, dsn string, port int) *testServer {
	t.Helper()
	return &testServer{
		url:    fmt.Sprintf("http://127.0.0.1:%d", port),
		dsn:    dsn,
		db:     mustOpen(t, dsn),
		log:    &logBuffer{},
		client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: time.Minute},
	}
}

func TestFaultKilledServerLosesNothing(t *testing.T) {
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProgram(t, asAppRole(dsn), port)
	s := serverAt(t, dsn, port)
	l := mustLedger(t, s)
	l.workWhile(t, func() {
		for range 5 * *faults {
			sleepAtRandom(50, 250)
			p.kill()
			p = mustProgram(t, asAppRole(dsn), port)
		}
	})
	l.check(t, s.db)
	if l.counts.unanswered == 0 {
		t.Error("every request was answered: was the server killed?")
	}
}

func TestFaultSIGTERMUnderLoadLosesNoAcknowledgedWrite(t *testing.T) { // S30
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	s := serverAt(t, dsn, port)
	s.client.Transport = &http.Transport{DisableKeepAlives: true} // so that no connection is closed for being idle
	first := mustProgram(t, asAppRole(dsn), port)
	l := mustLedger(t, s)
	first.kill()
	for range *faults {
		p := mustProgram(t, asAppRole(dsn), port)
		before := l.counts.acknowledged
		ctx, stop := context.WithCancel(context.Background())
		clients := l.work(ctx, t, 8)
		sleepAtRandom(300, 600)
		stop() // requests under way may end; those that are tried again end with the next server
		p.mustDrain(t)

		next := mustProgram(t, asAppRole(dsn), port)
		clients.Wait()
		next.kill()
		served := strings.Count(p.log.String(), "status=200") + strings.Count(next.log.String(), "status=200")
		if answered := l.counts.acknowledged - before; answered != served {
			t.Errorf("%d requests were served, and %d answers arrived", served, answered)
		}
	}
	l.check(t, s.db)
}

// mustDrain sends SIGTERM, after which the program must end well, and in time.
func (p *program) mustDrain(t *testing.T) {
	t.Helper()
	begin := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := p.cmd.Wait()
	took := time.Since(begin)
	if err != nil || took > drainTimeout+5*time.Second {
		t.Errorf("after SIGTERM: %v, in %s", err, took)
	}
}

func TestStoppingServerFinishesWhatItBegan(t *testing.T) { // S30
	t.Parallel()
	s, key := mustTenant(t)
	var began, ended sync.WaitGroup
	stopping := make(chan struct{})
	for i := range 4 {
		began.Add(1)
		body, bodyWriter := io.Pipe()
		go func() {
			// The client sends its body only once the server has asked for it, so a handler reads the first part.
			io.WriteString(bodyWriter, `{"run_start_time":"2025-01-01",`)
			began.Done()
			<-stopping
			io.WriteString(bodyWriter, `"value_rows":[`+rowOf(fmt.Sprintf("s%d", i))+`]}`)
			bodyWriter.Close()
		}()
		ended.Go(func() {
			r, _ := http.NewRequest("POST", s.url+"/upload", body)
			r.Header.Set("X-API-Key", key)
			r.Header.Set("Content-Type", "application/json")
			r.Header.Set("Expect", "100-continue")
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
	code := make(chan int, 1)
	go func() { code <- s.stop() }()
	waitUntil(t, "the server is stopping, and lets nobody in any more", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	close(stopping)
	ended.Wait()
	if got := <-code; got != 0 {
		t.Errorf("exit %d after a stop, want 0", got)
	}
	if got := s.stored(t); got != "4 4 4 4" {
		t.Errorf("stored %q, want every acknowledged upload", got)
	}
}

func TestFaultTwoServersActAsOne(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	servers := []*testServer{mustAPI(t, dsn), mustAPI(t, dsn)}
	l := mustLedger(t, servers...)
	for n := range 10 * *faults {
		// The same request comes eight times at once, and its series is new.
		id := fmt.Sprintf(`"run_id":"00000000-0000-4000-8000-%012x",`, n)
		body := runWith(id, rowOf(fmt.Sprintf("new %d", n)))
		answers := make([]string, 8)
		together(8, func(i int) {
			resp, text, err := servers[i%2].do("POST", "/upload", l.key, body)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("POST /upload: %v %v %s", err, resp, text)
			}
			answers[i] = text
		})
		for _, answer := range answers {
			if answer != answers[0] {
				t.Errorf("one request is answered with %s and with %s", answers[0], answer)
			}
		}
	}
	l.workFor(t, 8, time.Duration(*faults)*time.Second)
	l.check(t, servers[0].db)
	twice := mustQuery(t, servers[0].db, `SELECT count(*) FROM (SELECT FROM values_table WHERE version > 1
		GROUP BY series_number, run_id, valid_from, version HAVING count(*) > 1) AS twice`)
	if twice != "0" {
		t.Errorf("%s versions were given twice", twice)
	}
}

// ---- PostgreSQL is killed, is full, takes no writes, or is another one

// cluster is a PostgreSQL of the test's own, which can be killed. It listens on 127.0.0.1 alone, and asks for no
// password.
type cluster struct {
	bin, data string
	port      int
	cmd       *exec.Cmd
	log       logBuffer
}

// mustCluster starts a cluster: an empty one, or a standby of another.
func mustCluster(t *testing.T, primary *cluster) *cluster {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("no PostgreSQL server is installed here whose processes could be killed")
	}
	newest := filepath.Dir(found[len(found)-1])
	c := &cluster{bin: newest, data: filepath.Join(mustFolder(t), "data"), port: freePort(t)}
	create := exec.Command(c.bin+"/initdb", "-D", c.data, "-U", "timedb",
		"--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8")
	if primary != nil {
		create = exec.Command(c.bin+"/pg_basebackup", "-D", c.data, "-R", "-c", "fast",
			"-d", primary.dsn("postgres"))
	}
	mustSucceed(t, c.as(create))
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			t.Logf("the end of PostgreSQL's log: %s", tail(&c.log))
		}
	})
	c.mustStart(t)
	return c
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

// as makes cmd run as the user postgres if the tests run as root, which PostgreSQL refuses to run as.
func (c *cluster) as(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = "/"
	who, err := osuser.Lookup("postgres")
	if err != nil || os.Getuid() != 0 {
		return cmd
	}
	uid, _ := strconv.ParseUint(who.Uid, 10, 32)
	gid, _ := strconv.ParseUint(who.Gid, 10, 32)
	credential := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	os.Chown(filepath.Dir(c.data), int(uid), int(gid))
	return cmd
}

func (c *cluster) dsn(database string) string {
	return fmt.Sprintf("postgresql://timedb@127.0.0.1:%d/%s?sslmode=disable", c.port, database)
}

// mustStart starts PostgreSQL and waits until it answers. What is left of a killed PostgreSQL can prevent the start for
// a moment, so one that ends is started again.
func (c *cluster) mustStart(t *testing.T) {
	t.Helper()
	db := mustOpen(t, c.dsn("postgres"))
	ended := c.mustLaunch(t)
	waitUntil(t, "PostgreSQL answers", func() bool {
		select {
		case <-ended:
			ended = c.mustLaunch(t)
		default:
		}
		return db.Ping() == nil
	})
}

// mustLaunch starts the process of PostgreSQL. The channel is closed when it has ended.
func (c *cluster) mustLaunch(t *testing.T) (ended chan struct{}) {
	t.Helper()
	cmd := c.as(exec.Command(c.bin+"/postgres", "-D", c.data, "-p", strconv.Itoa(c.port),
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=100"))
	cmd.Stderr = &c.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.cmd = cmd
	ended = make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	return ended
}

func (c *cluster) kill() { c.cmd.Process.Kill() }

func TestFaultKilledDatabaseLosesNothing(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	dsn, port := c.dsn("postgres"), freePort(t)
	mustRun(t, 0, dsn, "", "create", "tables", "--with-users", "-y")
	mustProgram(t, dsn, port)
	s := serverAt(t, dsn, port)
	l := mustLedger(t, s)
	l.workWhile(t, func() {
		for range *faults {
			sleepAtRandom(300, 800)
			c.kill()
			for range 3 {
				resp, text, err := s.do("GET", aRead, l.key, "")
				// It is 200 if the last of PostgreSQL's processes still answered.
				if err != nil || resp.StatusCode != 503 && resp.StatusCode != 200 {
					t.Errorf("without a database: %v %v %s", err, resp, text)
				}
			}
			c.mustStart(t)
			returned := time.Now()
			lastRefused := returned
			waitUntil(t, "reads are served again", func() bool {
				if l.send(t, s, "GET", aRead, "") {
					return true
				}
				lastRefused = time.Now()
				return false
			})
			if lastRefused.Sub(returned) > 2*time.Second {
				t.Error("no service two seconds after the database's return")
			}
		}
	})
	l.check(t, s.db)
	if l.counts.unavailable == 0 {
		t.Error("there was no 503: was the database killed?")
	}
}

func TestFaultStandbyServesReadsAndRefusesWrites(t *testing.T) {
	t.Parallel()
	primary := mustCluster(t, nil)
	dsn := primary.dsn("postgres")
	mustRun(t, 0, dsn, "", "create", "tables", "--with-users", "-y")
	l := mustLedger(t, mustAPIOn(t, dsn, dsn))
	standby := mustCluster(t, primary).dsn("postgres")
	s := mustAPIOn(t, standby, standby)
	s.must(t, 200, "GET", "/healthz", "", "")
	if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", l.key, "")); got.Count != 3 {
		t.Errorf("the standby shows %d values, want 3", got.Count)
	}
	correction := `{"updates":[{"valid_time":"2025-01-01","series_key":"load","value":2}]}`
	s.runRequests(t, l.key, []requestCase{
		{"an upload", "POST", "/upload", runWith("", at("2025-01-01", "1")), 503, nil},
		{"a new series", "POST", "/series", `{"name":"new"}`, 503, nil},
		{"a correction", "PUT", "/values", correction, 503, nil},
	})
}

func TestFaultFullDiskIs503AndStoresNothingInPart(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	disk := mustSmallDisk(t, c)
	owner := mustOpen(t, c.dsn("postgres"))
	mustExec(t, owner, "CREATE TABLESPACE small LOCATION '"+disk+"'")
	mustExec(t, owner, "CREATE DATABASE small TABLESPACE small")
	dsn := c.dsn("small")
	mustRun(t, 0, dsn, "", "create", "tables", "--with-users", "-y")
	s := mustAPIOn(t, dsn, dsn)
	l := mustLedger(t, s)
	_, body := uploadBodies(10_000)
	for n := 0; l.sendCSV(t, s, "", body); n++ {
		if n == 1000 {
			t.Fatal("the disk is never full")
		}
	}
	if l.counts.unavailable != 1 {
		t.Errorf("on a full disk: %+v %v", l.counts, l.other)
	}
	s.must(t, 200, "GET", aRead, l.key, "")
	mustSucceed(t, exec.Command("mount", "-o", "remount,size=200m", disk))
	if !l.sendCSV(t, s, "", body) {
		t.Errorf("after the disk was enlarged: %v", l.other)
	}
	l.check(t, s.db)
}

// mustSmallDisk mounts a disk of 24 MiB that the cluster may use, and skips the test where that is not allowed.
func mustSmallDisk(t *testing.T, c *cluster) (folder string) {
	t.Helper()
	folder = mustFolder(t)
	mount := exec.Command("mount", "-t", "tmpfs", "-o", "size=24m", "none", folder)
	if out, err := mount.CombinedOutput(); err != nil {
		t.Skipf("a small disk cannot be mounted here: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", folder).Run() })
	mustSucceed(t, exec.Command("chown", "--reference", c.data, folder))
	return folder
}

func TestDumpAndRestoreAnswersTheSame(t *testing.T) {
	t.Parallel()
	dsn, copied := mustDatabase(t), mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	original := mustAPI(t, dsn)
	l := mustLedger(t, original)
	l.workFor(t, 4, time.Second)
	const restore = `set -o pipefail; pg_dump "$0" | psql -qX -v ON_ERROR_STOP=1 "$1"`
	mustSucceed(t, exec.Command("bash", "-c", restore, dsn, copied))
	restored := mustAPI(t, copied)
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	for _, c := range []struct{ name, path string }{
		{"values", "/values"},
		{"all versions of the values of all runs", "/values?mode=overlapping&all_versions=true"},
		{"runs", "/runs"},
		{"series", "/list_timeseries"},
		{"values as of now in CSV", "/values?format=csv&as_of=" + now},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := original.must(t, 200, "GET", c.path, l.key, "")
			after := restored.must(t, 200, "GET", c.path, l.key, "")
			if before != after {
				t.Errorf("GET %s differs after a restore", c.path)
			}
		})
	}
	restored.must(t, 200, "POST", "/upload", l.key, runWith("", at("2025-03-01", "1")))
}

// ---- Connections to PostgreSQL are cut or frozen

// proxy stands between timedb and PostgreSQL. It can cut all connections, and freeze them and those to come.
type proxy struct {
	dsn    string       // of the database behind the proxy
	target string       // where PostgreSQL listens
	mu     sync.RWMutex // held for writing while everything is frozen
	all    sync.Map     // the clients' connections, of net.Conn
}

func mustProxy(t *testing.T, dsn string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	u := mustParse(t, dsn)
	p := &proxy{target: u.Host}
	u.Host = listener.Addr().String()
	p.dsn = u.String()
	go p.accept(listener)
	return p
}

func (p *proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		database, err := net.Dial("tcp", p.target)
		if err != nil {
			client.Close()
			continue
		}
		p.all.Store(client, nil)
		go p.forward(client, database)
		go p.forward(database, client)
	}
}

// forward copies one direction of a connection, until either end closes it.
func (p *proxy) forward(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buf := make([]byte, 4096)
	for {
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

func (p *proxy) cut() {
	p.all.Range(func(conn, _ any) bool {
		p.all.Delete(conn)
		conn.(net.Conn).Close()
		return true
	})
}

// freeze stops all forwarding. Connections stay open, and new ones are accepted, but nothing is said on them.
func (p *proxy) freeze() { p.mu.Lock() }
func (p *proxy) thaw()   { p.mu.Unlock() }

func TestFaultCutConnectionsLoseNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	l.workWhile(t, func() {
		for range 15 * *faults {
			sleepAtRandom(20, 170)
			p.cut()
		}
	})
	l.check(t, s.db)
	if l.counts.unavailable == 0 {
		t.Error("there was no 503: were connections cut?")
	}
}

func TestFaultFrozenDatabaseIs503AndThenServesAgain(t *testing.T) { // S11
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	s.client.Timeout = authTimeout + cancelTimeout + 2500*time.Millisecond // less than twice authTimeout
	p.freeze()
	paths := []string{"/values", "/healthz", "/runs", "/list_timeseries", aRead}
	together(len(paths), func(i int) {
		resp, text, err := s.do("GET", paths[i], l.key, "")
		if err != nil || resp.StatusCode != 503 {
			t.Errorf("GET %s of a frozen database: %v %v %s", paths[i], err, resp, text)
		}
	})
	p.thaw()
	waitUntil(t, "reads are served again", func() bool { return l.send(t, s, "GET", aRead, "") })
	s.must(t, 200, "GET", "/healthz", "", "")
}

func TestFaultFrozenDatabaseIsGivenUpWithinItsConnectTimeout(t *testing.T) {
	t.Parallel()
	p := mustProxy(t, mustDatabase(t))
	st, err := openStore(p.dsn+"&connect_timeout=1", "public", statementTimeout, 1, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	defer st.db.Close()
	p.freeze()
	defer p.thaw()
	failed := make(chan error, 1)
	go func() { failed <- st.db.Ping() }()
	select {
	case err := <-failed:
		if err == nil || !unavailable(err) {
			t.Errorf("Ping: %v", err)
		}
	case <-time.After(30 * time.Second): // long before statementTimeout
		t.Error("it still waits to be connected")
	}
}

// ---- Statements wait, or are ended

// mustLock makes every statement on a table wait until unlock is called or the test ends.
func (s *testServer) mustLock(t *testing.T, table string) (unlock func()) {
	t.Helper()
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec("LOCK TABLE " + table); err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

// lockWaits is what pg_locks shows of the statements that wait for the table $1 of this database.
const lockWaits = `pg_locks WHERE NOT granted AND relation = $1::regclass
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`

// waitForLockWaits waits until n statements wait for the table.
func (s *testServer) waitForLockWaits(t *testing.T, table string, n int) {
	t.Helper()
	waitUntil(t, fmt.Sprintf("%d statements wait for %s", n, table), func() bool {
		return mustQuery(t, s.db, "SELECT count(*) FROM "+lockWaits, table) == strconv.Itoa(n)
	})
}

func TestFaultFullPoolIs503AndKeysAreStillJudged(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	deactivated := s.mustUser(t, tenantB, "b@example.com")
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "b@example.com")
	unlock := s.mustLock(t, "values_table")
	const tooMany = 20
	var all sync.WaitGroup
	for range tenantPlaces + tooMany {
		all.Go(func() { l.send(t, s, "GET", aRead, "") })
	}
	s.waitForLockWaits(t, "values_table", tenantPlaces)
	s.must(t, 200, "GET", "/healthz", "", "")
	s.must(t, 401, "GET", "/values", "", "")
	s.must(t, 401, "GET", "/values", deactivated, "") // which takes a look-up
	waitUntil(t, "the requests that got no place are refused", func() bool {
		return l.unavailable() >= tooMany
	})
	unlock()
	all.Wait()
	want := outcomes{acknowledged: tenantPlaces, unavailable: tooMany}
	if l.counts != want || len(l.other) > 0 {
		t.Errorf("requests ended as %+v, want %+v; others: %v", l.counts, want, l.other)
	}
}

// eraserRuns are the run_ids that the clients of TestFaultErasureAmongWritersLeavesNothingInPart upload again and again.
var eraserRuns = []string{runA, runB, tenantA, tenantB}

const eraserRows = 1200 // of each of two series: two blocks

// eraserCSV is the body of such an upload.
func eraserCSV() string {
	body := []byte("valid_time,value_key,value\n")
	for i := range eraserRows {
		body = fmt.Appendf(body, "2025-02-01T00:%02d:%02dZ,e0,1\n2025-02-01T00:%02d:%02dZ,e1,1\n", i/60, i%60, i/60, i%60)
	}
	return string(body)
}

// Runs and series are erased while others upload, correct and read them.
func TestFaultErasureAmongWritersLeavesNothingInPart(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	body := eraserCSV()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var counts sync.Map // how often each kind of request had each status
	client := func(kind, method, path, body string, header ...string) string {
		resp, text, err := s.do(method, path, key, body, header...)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			return ""
		}
		if resp.StatusCode != 200 && resp.StatusCode != 404 {
			t.Errorf("%s: status %d: %s", kind, resp.StatusCode, text)
		}
		n, _ := counts.LoadOrStore(fmt.Sprint(kind, " ", resp.StatusCode), new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		if resp.StatusCode != 200 {
			return ""
		}
		return text
	}
	var clients sync.WaitGroup
	for i := range 5 {
		clients.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				switch i {
				case 0, 1, 2:
					client("upload", "POST", "/upload?run_start_time=2025-01-01&known_time=2025-01-01&run_id="+
						eraserRuns[n%len(eraserRuns)], body, "Content-Type: text/csv")
				case 3:
					client("correct", "PUT", "/values", corrections(fmt.Sprintf(
						`{"series_key":"e%d","valid_time":"2025-02-01T00:00:%02dZ","value":%d}`, n%2, n%60, n)))
				case 4:
					text := client("read", "GET", "/values?mode=overlapping&detail=true&series_key=e1", "")
					if text == "" {
						continue
					}
					rows := map[string]int{}
					for _, row := range mustDecode[readAnswer](t, text).Data {
						rows[row.Run]++
					}
					for run, n := range rows {
						if n != eraserRows {
							t.Errorf("a read shows %d of the %d values of run %s", n, eraserRows, run)
						}
					}
				}
			}
		})
	}
	for n := range 60 * *faults {
		line := "delete runs --run-id " + eraserRuns[n%len(eraserRuns)]
		switch n % 5 {
		case 3:
			line = fmt.Sprintf("delete series -k e%d", n%2)
		case 4:
			line = "delete runs --known-before 2026-01-01"
		}
		args := append(strings.Fields(line), "-y", "-t", tenantA)
		code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": s.dsn}, "", args...)
		if code != 0 && !strings.Contains(stderr, "there is no ") {
			t.Errorf("%s: exit %d: %s", line, code, stderr)
		}
	}
	stop()
	clients.Wait()
	counts.Range(func(kind, n any) bool {
		t.Log(kind, n.(*atomic.Int64).Load())
		return true
	})
	for _, kind := range []string{"upload 200", "correct 200", "correct 404", "read 200"} {
		if _, happened := counts.Load(kind); !happened {
			t.Errorf("there was no %s", kind)
		}
	}
	if got := mustQuery(t, s.db, orphans); got != "0" {
		t.Errorf("%s rows of values have lost their run or series", got)
	}
	parts := mustQuery(t, s.db, `SELECT count(*) FROM (
		SELECT FROM value_blocks WHERE version = 1 GROUP BY run_id, series_id
		HAVING sum(cardinality("values")) <> $1) AS part`, eraserRows)
	if parts != "0" {
		t.Errorf("%s runs are stored in part", parts)
	}
}

func TestFaultHealthAnswersWhileEveryLookupWaits(t *testing.T) { // S23
	t.Parallel()
	s, key := mustTenant(t)
	unlock := s.mustLock(t, "users_table")
	var all sync.WaitGroup
	defer all.Wait()
	defer unlock()
	for range 8 * lookupPool {
		all.Go(func() { s.do("GET", "/values", key, "") })
	}
	s.waitForLockWaits(t, "users_table", lookupPool)
	s.must(t, 200, "GET", "/healthz", "", "")
}

func TestFaultEndedStatementIs503AndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	unlock := s.mustLock(t, "values_table")
	acknowledged := make(chan bool, 1)
	body := runWith("", at("2025-02-01", "1"))
	go func() { acknowledged <- l.send(t, s, "POST", "/upload", body) }()
	s.waitForLockWaits(t, "values_table", 1)
	// Statements end with SQLSTATE 57014, as when statement_timeout ends them.
	mustExec(t, s.db, "SELECT pg_cancel_backend(pid) FROM "+lockWaits, "values_table")
	if <-acknowledged || l.counts.unavailable != 1 {
		t.Errorf("an upload whose statement was ended: %+v %v", l.counts, l.other)
	}
	unlock()
	if got := s.stored(t); !strings.HasPrefix(got, "1 ") {
		t.Errorf("stored %q", got)
	}
}

// ---- Clients leave before they are answered

func TestFaultClientThatHangsUpIsNoErrorInTheLog(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1")))
	s.mustLock(t, "values_table")
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	ended := make(chan error, 1)
	go func() {
		r, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/values", nil)
		r.Header.Set("X-API-Key", key)
		_, err := s.client.Do(r)
		ended <- err
	}()
	s.waitForLockWaits(t, "values_table", 1)
	hangUp()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`level=(\w+) msg=request route="GET /values" status=503`)
	waitUntil(t, "the request is logged", func() bool { return line.MatchString(s.log.String()) })
	if level := line.FindStringSubmatch(s.log.String())[1]; level != "INFO" {
		t.Errorf("a client's hanging up is logged as %s: %s", level, s.log)
	}
}

func TestAbandonedAndTruncatedUploadsStoreNothing(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	// All of the JSON is sent, but Content-Length promises more.
	body := runWith("", at("2025-01-01", "1"))
	request := fmt.Sprintf("POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", key, len(body)+10, body)
	checkNothingStored := func(t *testing.T, requests int) {
		t.Helper()
		waitUntil(t, "the request is logged", func() bool {
			return strings.Count(s.log.String(), `route="POST /upload" `) == requests
		})
		if got := s.stored(t); got != "0 0 0" {
			t.Errorf("a body that ended too early stored %q", got)
		}
	}
	t.Run("the client sends no more, and waits for the answer", func(t *testing.T) {
		conn := s.mustDial(t)
		io.WriteString(conn, request)
		conn.(*net.TCPConn).CloseWrite()
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 422 ") {
			t.Errorf("%q %v, want a 422", answer, err)
		}
		checkNothingStored(t, 1)
	})
	t.Run("the client hangs up", func(t *testing.T) {
		conn := s.mustDial(t)
		io.WriteString(conn, request)
		conn.Close()
		checkNothingStored(t, 2)
	})
}

// ---- Load that is too much, or that does not end

func TestFaultOverloadIsAnsweredAndPasses(t *testing.T) { // S23
	s := mustServer(t)
	l := mustLedger(t, s)
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000}, Timeout: time.Minute}
	body, _ := uploadBodies(20_000)
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(*faults)*3*time.Second)
	defer stop()
	var all sync.WaitGroup
	for client := range 100 + 45**faults {
		all.Go(func() {
			for n := client; ctx.Err() == nil; n++ {
				switch n % 10 {
				case 0:
					l.send(t, s, "POST", "/upload", body)
				case 1:
					l.send(t, s, "GET", "/values", "")
				default:
					l.send(t, s, "GET", aRead, "")
				}
			}
		})
	}
	for ctx.Err() == nil {
		s.probe(t, "/healthz")
		s.probe(t, "/")
		time.Sleep(100 * time.Millisecond) // the pace of probes, which must not be a load of their own
	}
	all.Wait()
	if len(l.other) > 0 || l.counts.acknowledged == 0 || l.counts.unanswered > 0 {
		t.Errorf("requests ended as %+v; others: %v", l.counts, l.other)
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("requests ended as %+v; %d MiB from the system", l.counts, memory.Sys>>20)
	if memory.Sys > 2<<30 { // this includes the memory of the clients
		t.Errorf("%d MiB from the system", memory.Sys>>20)
	}
	s.must(t, 200, "GET", aRead, l.key, "") // at once
}

// probeClient has connections of its own, as whoever watches over a server has.
var probeClient = &http.Client{Timeout: 30 * time.Second}

// probe gets a path without a key, which must be answered with 200.
func (s *testServer) probe(t *testing.T, path string) {
	t.Helper()
	resp, err := probeClient.Get(s.url + path)
	if err != nil {
		t.Errorf("GET %s under load: %v", path, err)
		return
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("GET %s under load: %v", path, resp)
	}
}

func TestFaultSoakGrowsNothing(t *testing.T) {
	s := mustServer(t)
	l := mustLedger(t, s)
	unit := time.Duration(*faults**faults) * 150 * time.Millisecond
	l.workFor(t, 8, unit) // fills pools and caches
	before := s.measure(t)
	l.workFor(t, 8, 9*unit)
	l.check(t, s.db)
	// The ledger and the log grow in this process too, but they are not the server's.
	l.forget()
	s.log.mu.Lock()
	s.log.buf = bytes.Buffer{}
	s.log.mu.Unlock()
	after := s.measure(t)
	t.Logf("%+v → %+v", before, after)
	if after.goroutines > before.goroutines+10 {
		t.Errorf("goroutines grow from %d to %d", before.goroutines, after.goroutines)
	}
	if after.connections > poolSize+lookupPool+1 {
		t.Errorf("there are %d connections to the database", after.connections)
	}
	if after.heap > before.heap+16<<20 {
		t.Errorf("the heap grows from %d to %d bytes", before.heap, after.heap)
	}
}

// footprint is what a server holds, and with it the rest of this process.
type footprint struct {
	goroutines  int
	connections int    // to the database, as the API's role
	heap        uint64 // bytes
}

func (s *testServer) measure(t *testing.T) footprint {
	t.Helper()
	s.client.CloseIdleConnections()
	// Goroutines of closed connections need a moment to end. How many are left is what is measured, so no condition
	// says when to go on.
	time.Sleep(300 * time.Millisecond)
	runtime.GC()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	connections := mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND usename = $1`, appRole.name)
	n, err := strconv.Atoi(connections)
	if err != nil {
		t.Fatal(err)
	}
	return footprint{runtime.NumGoroutine(), n, memory.HeapAlloc}
}

// ---- Neighbours: what one tenant does to the others

// Within a bubble of synctest time passes at once when everyone waits, so shareWait costs nothing.

func TestSharesAreDividedAmongTenants(t *testing.T) { // S33
	t.Parallel()
	a, b, c := Caller{tenant: "a"}, Caller{tenant: "b"}, Caller{tenant: "c"}
	everyone := Caller{tenant: openTenant, open: true}
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s *shares) // of 10, of which each tenant may have 4
	}{
		{"a tenant gets its share", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 1, nil)
			expectTaken(t, s, a, 3, nil)
			s.give(a, 4, nil)
		}},
		{"a tenant gets no more than its share", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 4, nil)
			expectTaken(t, s, a, 1, busy)
			expectTaken(t, s, b, 4, nil)
			s.give(a, 4, nil)
			s.give(b, 4, nil)
		}},
		{"all tenants get no more than there is", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 4, nil)
			expectTaken(t, s, b, 4, nil)
			expectTaken(t, s, c, 3, busy)
			expectTaken(t, s, c, 2, nil)
			s.give(a, 4, nil)
			s.give(b, 4, nil)
			s.give(c, 2, nil)
		}},
		{"in open mode the only tenant gets all", func(t *testing.T, s *shares) {
			expectTaken(t, s, everyone, 10, nil)
			expectTaken(t, s, everyone, 1, busy)
			s.give(everyone, 10, nil)
		}},
		{"whoever waits gets what is given back", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 4, nil)
			go func() {
				time.Sleep(shareWait / 2)
				s.give(a, 1, nil)
				time.Sleep(shareWait / 4)
				s.give(a, 3, nil)
			}()
			begin := time.Now()
			expectTaken(t, s, a, 4, nil)
			if waited := time.Since(begin); waited != shareWait/2+shareWait/4 {
				t.Errorf("waited %s", waited)
			}
			s.give(a, 4, nil)
		}},
		{"all who wait get their part", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 4, nil)
			go func() {
				time.Sleep(time.Second)
				s.give(a, 4, nil)
			}()
			together(4, func(int) { expectTaken(t, s, a, 1, nil) })
			s.give(a, 4, nil)
		}},
		{"a request that has ended waits no more", func(t *testing.T, s *shares) {
			expectTaken(t, s, a, 4, nil)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			err := s.take(ctx, a, 1, nil)
			if waited := time.Since(begin); err != ctx.Err() || err == nil || waited != time.Second {
				t.Errorf("%v after %s", err, waited)
			}
			s.give(a, 4, nil)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShares(10, 4)
				test.run(t, s)
				expectNothingTaken(t, s)
			})
		})
	}
}

// expectTaken takes a part, for which the outcome must be the wanted kind of refusal, or none.
// Whoever is told that the server is busy must have waited, and whoever asks for too much must not.
func expectTaken(t *testing.T, s *shares, c Caller, amount int64, want any) {
	t.Helper()
	begin := time.Now()
	got := kindOf(s.take(t.Context(), c, amount, nil))
	waited := time.Since(begin)
	if got != want {
		t.Errorf("tenant %s takes %d: %v, want %v", c.tenant, amount, got, want)
	}
	if (want == busy) != (waited == shareWait) || want == tooLarge && waited > 0 {
		t.Errorf("tenant %s takes %d after %s: %v", c.tenant, amount, waited, got)
	}
}

// expectNothingTaken reports what is still taken, and tenants that are still remembered.
func expectNothingTaken(t *testing.T, s *shares) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken != 0 || len(s.byTenant) != 0 || len(s.first) != 0 {
		t.Errorf("%d is still taken, by tenant: %v", s.taken, s.byTenant)
	}
}

func TestClaimGrowsWithinItsTenantsShare(t *testing.T) { // S34
	t.Parallel()
	const share = 4 * claimStep
	a := Caller{tenant: "a"}
	for _, test := range []struct {
		name               string
		other, first, then int64 // bytes of another request; of this one, before and afterwards
		want               any   // kind of refusal
		held               int64 // after all
	}{
		{"nothing", 0, 0, 0, nil, 0},
		{"one byte takes a step", 0, 0, 1, nil, claimStep},
		{"a whole step", 0, 1, claimStep, nil, claimStep},
		{"one byte more than a step", 0, 1, claimStep + 1, nil, 2 * claimStep},
		{"less than before", 0, 2 * claimStep, 1, nil, 2 * claimStep},
		{"the share", 0, 1, share, nil, share},
		{"more than the share at once", 0, 0, share + 1, tooLarge, 0},
		{"more than the share at last", 0, share, share + 1, tooLarge, share},
		{"what is left of the share", 2 * claimStep, claimStep, 2 * claimStep, nil, 2 * claimStep},
		{"more than is left", 2 * claimStep, claimStep, 3 * claimStep, busy, claimStep},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShares(2*share, share)
				other := &claim{of: s, caller: a}
				c := &claim{of: s, caller: a}
				if other.reach(t.Context(), test.other) != nil || c.reach(t.Context(), test.first) != nil {
					t.Fatal("the first claims are refused")
				}
				got := kindOf(c.reach(t.Context(), test.then))
				if got != test.want || c.held != test.held {
					t.Errorf("%v, and holds %d; want %v and %d", got, c.held, test.want, test.held)
				}
				c.release()
				other.release()
				expectNothingTaken(t, s)
			})
		})
	}
}

// What a request has decoded is counted while it arrives. What takes more than its tenant may have does not reach the
// store, of which there is none here.
func TestWhatIsDecodedIsCounted(t *testing.T) { // S34
	t.Parallel()
	key, _, _ := newKey()
	keys := recordedKeys{record: func(digest []byte) keyRecord {
		return keyRecord{id: "known", tenant: tenantA, digest: digest, active: true}
	}}
	const share = bodyBytes + 1<<20
	row := at("2025-01-01", "1")
	long := correctionAt("01", `"series_key":"load","annotation":"`+strings.Repeat("x", maxProse)+`"`)
	for _, c := range []struct{ name, method, path, contentType, body string }{
		{"rows of JSON", "POST", "/upload", "application/json", runWith("", strings.Repeat(row+",", 1<<20/rowBytes)+row)},
		{"rows of CSV", "POST", "/upload", "text/csv",
			"valid_time,value_key,value\n" + strings.Repeat("2025-01-01,load,1\n", 1<<20/rowBytes+1)},
		{"updates", "PUT", "/values", "application/json", corrections(strings.Repeat(long+",", 1<<20/maxProse) + long)},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(nil, keys, &authenticator{keys: keys}, slog.New(slog.DiscardHandler))
			s.memory = newShares(share, share)
			r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
			r.Header.Set("X-API-Key", key)
			r.Header.Set("Content-Type", c.contentType)
			w := httptest.NewRecorder()
			s.ServeHTTP(timelessRecorder{w}, r)
			if w.Code != 413 || !strings.Contains(w.Body.String(), "memory") {
				t.Errorf("%d %s, want 413", w.Code, w.Body)
			}
		})
	}
}

func TestClaimsThatGrowTogetherDoNotWaitForEachOther(t *testing.T) { // S33
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const clients, steps = 8, 4
		s := newShares(1<<40, clients*steps*claimStep/2) // the share is enough for half of them
		together(clients, func(i int) {
			c := &claim{of: s, caller: Caller{tenant: "a"}}
			defer c.release()
			for n := range int64(steps) {
				if err := c.reach(t.Context(), (n+1)*claimStep); err != nil {
					t.Errorf("client %d, step %d: %v", i, n, err)
					return
				}
				time.Sleep(100 * time.Millisecond) // a body arrives piece by piece
			}
		})
		expectNothingTaken(t, s)
	})
}

// kindOf is the kind of a refusal, and nil of no error.
func kindOf(err error) any {
	if refused, ok := errors.AsType[*refusal](err); ok {
		return refused.kind
	}
	if err != nil {
		return err
	}
	return nil
}

// insider is a server as `timedb api` starts it, over TLS, whose places and memory can be counted.
type insider struct {
	*testServer
	server *server
}

// mustInsider starts a server on a database of its own: with users, or else in open mode.
func mustInsider(t *testing.T, withUsers bool) insider {
	t.Helper()
	dsn := mustDatabase(t)
	var users []string
	if withUsers {
		users = []string{"--with-users"}
	}
	mustCreateTables(t, dsn, users...)
	log, out := &logBuffer{}, &logBuffer{}
	open := func(timeout time.Duration, connections int) *store {
		st, err := openStore(asAppRole(dsn), "public", timeout, connections, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.db.Close() })
		return st
	}
	cert, private := mustCertificate(t)
	host, port := "127.0.0.1", 0
	auth := &authenticator{keys: open(authTimeout, lookupPool), host: host}
	logger := slog.New(slog.NewTextHandler(log, nil))
	x := insider{server: newServer(open(statementTimeout, poolSize), open(healthTimeout, 1), auth, logger)}
	c := &cli{stdout: out, stderr: log}
	options := apiOptions{host: host, port: port, tlsCert: cert, tlsKey: private}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.serve(ctx, x.server, options, logger) }()
	trusting := &tls.Config{InsecureSkipVerify: true} // it is about neighbours, not about TLS
	x.testServer = &testServer{dsn: dsn, db: mustOpen(t, dsn), log: log, client: &http.Client{
		Transport: &http.Transport{TLSClientConfig: trusting, MaxIdleConnsPerHost: 100}}}
	t.Cleanup(func() {
		stop()
		x.client.CloseIdleConnections()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	waitUntil(t, "the server serves", func() bool { return servesLine.MatchString(out.String()) })
	x.url = servesLine.FindStringSubmatch(out.String())[1]
	return x
}

// dialTLS opens a connection over TLS on which the given protocol is spoken: h2 or http/1.1.
func (s *testServer) dialTLS(address, protocol string) (*tls.Conn, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	conn.(*net.TCPConn).SetReadBuffer(4 << 10) // so that the server soon notices who does not read
	return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}), nil
}

// heldBy are the places and the bytes that a tenant holds.
func (x insider) heldBy(tenant string) (places, bytes int64) {
	count := func(s *shares) int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.byTenant[tenant]
	}
	return count(x.server.store.places), count(x.server.memory)
}

// waitUntilAllIsFree waits until no request holds a place or memory.
func (x insider) waitUntilAllIsFree(t *testing.T) {
	t.Helper()
	for _, s := range []*shares{x.server.store.places, x.server.memory} {
		waitUntil(t, "nothing is taken", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.taken == 0 && len(s.byTenant) == 0 && len(s.first) == 0
		})
	}
}

// greedy is a tenant that takes what it can get.
type greedy struct {
	insider
	tenant, key string
	ctx         context.Context // ends with the load
	requests    sync.WaitGroup
	conns       []net.Conn
}

// mustConnect opens a connection that is closed when the load ends.
func (g *greedy) mustConnect(t *testing.T, protocol string) net.Conn {
	t.Helper()
	conn, err := g.dialTLS(strings.TrimPrefix(g.url, "https://"), protocol)
	if err != nil {
		t.Fatal(err)
	}
	g.conns = append(g.conns, conn)
	return conn
}

// stallUploads begins n uploads of so many bytes, and says no more.
func (g *greedy) stallUploads(t *testing.T, n, bytes int) {
	row := rowOf("stalled") + ","
	body := `{"value_rows":[` + strings.Repeat(row, bytes/len(row)+1)
	for range n {
		fmt.Fprintf(g.mustConnect(t, "http/1.1"), "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", g.key, maxBody, body)
	}
}

// readNothing asks for something n times on connections of their own, and reads no answer.
func (g *greedy) readNothing(t *testing.T, n int, path string) {
	for range n {
		io.WriteString(g.mustConnect(t, "http/1.1"), rawGet(path, g.key))
	}
}

// openNoWindow asks n times on one connection of HTTP/2 whose windows are zero, so that no answer
// can be sent.
func (g *greedy) openNoWindow(t *testing.T, n int, path string) {
	conn := g.mustConnect(t, "h2")
	io.WriteString(conn, http2Begin)
	for i := range n {
		conn.Write(http2Headers(2*i+1, true, "GET", path, g.key))
	}
	go io.Copy(io.Discard, conn) // headers and settings
}

// http2Begin is what a client says first (RFC 9113, 3.4), with SETTINGS_INITIAL_WINDOW_SIZE 0.
const http2Begin = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" +
	"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + "\x00\x04\x00\x00\x00\x00"

// http2Frame is a frame of HTTP/2 (RFC 9113, 4.1).
func http2Frame(kind, flags byte, stream int, payload []byte) []byte {
	n := len(payload)
	frame := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}
	frame = binary.BigEndian.AppendUint32(frame, uint32(stream))
	return append(frame, payload...)
}

// http2Headers is a HEADERS frame in which every field is a literal (RFC 7541, 6.2.2) without
// Huffman codes. With END_STREAM it is the whole request.
func http2Headers(stream int, endStream bool, method, path, key string) []byte {
	var block []byte
	for _, field := range [][2]string{
		{":method", method}, {":scheme", "https"}, {":path", path}, {":authority", "x"},
		{"x-api-key", key}, {"content-type", "application/json"}, {"accept-encoding", "gzip"},
	} {
		block = append(block, 0, byte(len(field[0])))
		block = append(block, field[0]...)
		block = append(block, byte(len(field[1])))
		block = append(block, field[1]...)
	}
	flags := byte(0x4) // END_HEADERS
	if endStream {
		flags |= 0x1
	}
	return http2Frame(1, flags, stream, block)
}

// repeat has n clients that send a request again and again until the load ends.
func (g *greedy) repeat(n int, method, path, body string, header ...string) {
	for range n {
		g.requests.Go(func() {
			for g.ctx.Err() == nil {
				r, _ := http.NewRequestWithContext(g.ctx, method, g.url+path, strings.NewReader(body))
				r.Header.Set("X-API-Key", g.key)
				r.Header.Set("Content-Type", "application/json")
				for _, line := range header {
					name, value, _ := strings.Cut(line, ": ")
					r.Header.Set(name, value)
				}
				resp, err := g.client.Do(r)
				if err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}
		})
	}
}

// lockSeries holds the key of a series that is not stored yet, until the load ends.
func (g *greedy) lockSeries(t *testing.T, key string) {
	tx, err := g.db.BeginTx(g.ctx, nil) // which is rolled back with ctx
	if err != nil {
		t.Fatal(err)
	}
	_, err = tx.Exec("INSERT INTO series_table (tenant_id, series_key, unit) VALUES ($1, $2, 'MW')",
		g.tenant, key)
	if err != nil {
		t.Fatal(err)
	}
}

const busyValues = 480 // of each run of the busy series

// busyTime is the valid_time of a value of a run of the busy series. Every run begins at the same
// time, and differs in the rest.
func busyTime(run, i int) string {
	valid := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(i) * 30 * time.Minute)
	if i > 0 {
		valid = valid.Add(time.Duration(run) * time.Second)
	}
	return valid.Format(time.RFC3339)
}

// mustBusySeries uploads runs of one series that overlap.
func (s *testServer) mustBusySeries(t *testing.T, key string, runs int) {
	t.Helper()
	const clients = 4
	together(clients, func(client int) {
		for run := client; run < runs; run += clients {
			body := []byte("valid_time,value_key,value\n")
			for i := range busyValues {
				body = fmt.Appendf(body, "%s,busy,%d\n", busyTime(run, i), run)
			}
			const path = "/upload?run_start_time=2025-01-01&known_time=2025-01-01"
			resp, text, err := s.do("POST", path, key, string(body), "Content-Type: text/csv")
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("an upload: %v %v %s", err, resp, text)
			}
		}
	})
}

// manyCorrections is a PUT of as many updates of the busy series as there may be.
func manyCorrections() string {
	var updates []string
	for i := range maxUpdates {
		updates = append(updates, fmt.Sprintf(`{"valid_time":%q,"series_key":"busy","value":%d}`,
			busyTime(i/busyValues, i%busyValues), rand.Int()))
	}
	return `{"updates":[` + strings.Join(updates, ",") + `]}`
}

const (
	longAnswer = "/values?series_key=long&detail=true" // some 9 MB
	// These compute much and answer little.
	cheapFirst  = "/values?series_key=busy&limit=1&as_of=2100-01-01"
	cheapLead   = "/values?series_key=busy&limit=1&lead=PT1H"
	cheapBucket = "/values?series_key=busy&bucket=P30D&agg=mean"
)

// load is what greedy tenants do to a server.
type load struct {
	name    string
	greedy  []string // tenants
	places  int64    // that each comes to hold, at least
	bytes   int64    // likewise
	refused bool     // what else the tenant asks for waits, and is refused
	begin   func(t *testing.T, g *greedy)
}

// It runs while no other test does, because it measures how long a neighbour waits.
func TestFaultGreedyTenantsLeaveTheOthersTheirShare(t *testing.T) { // S23, S33
	var waiting sync.WaitGroup // loads that wait take no processor time, so they run at once
	for _, c := range []load{
		{"stalled uploads", []string{tenantA}, 0, 40 << 19, false, func(t *testing.T, g *greedy) {
			g.stallUploads(t, 40, 1<<20+1)
		}},
		{"stalled uploads that take all of its memory", []string{tenantA}, 0, tenantMemory / 2, true,
			func(t *testing.T, g *greedy) {
				g.stallUploads(t, 2*tenantMemory/bodyBytes, 1) // twice as many as there is memory for
			}},
		{"answers that nobody reads", []string{tenantA}, tenantPlaces, 0, true,
			func(t *testing.T, g *greedy) {
				g.readNothing(t, 40, longAnswer)
			}},
		{"streams of HTTP/2 with a window of zero", []string{tenantA}, tenantPlaces, 0, true,
			func(t *testing.T, g *greedy) {
				g.openNoWindow(t, 40, longAnswer)
			}},
		{"corrections of a busy series", []string{tenantA}, 0, tenantMemory / 2, false,
			func(t *testing.T, g *greedy) {
				g.mustBusySeries(t, g.key, 200)
				g.repeat(16, "PUT", "/values", manyCorrections())
			}},
		{"reads that compute much and answer little", []string{tenantA}, tenantPlaces, 0, false,
			func(t *testing.T, g *greedy) {
				g.mustBusySeries(t, g.key, 200)
				g.repeat(9, "GET", cheapFirst, "")
				g.repeat(9, "GET", cheapLead, "")
				g.repeat(8, "GET", cheapBucket, "")
			}},
		{"uploads that are decoded all the time", []string{tenantA}, 0, 20 * claimStep, false,
			func(t *testing.T, g *greedy) {
				row := rowOf("long") + ","
				body := gzipped(`{"value_rows":[` + strings.Repeat(row, (1<<20)/len(row))) // and no end
				g.repeat(300, "POST", "/upload", body, isGzip)
			}},
		{"new series that wait for a lock", []string{tenantA}, tenantPlaces, 0, true,
			func(t *testing.T, g *greedy) {
				g.lockSeries(t, "locked")
				g.repeat(30, "POST", "/series", `{"name":"locked"}`)
			}},
		{"all of the memory and places of two tenants", []string{tenantA, nobody}, tenantPlaces, tenantMemory / 2,
			true, func(t *testing.T, g *greedy) {
				g.readNothing(t, tenantPlaces, longAnswer)
				waitUntil(t, "the places are taken", func() bool {
					places, _ := g.heldBy(g.tenant)
					return places == tenantPlaces
				})
				g.stallUploads(t, 2*tenantMemory/bodyBytes, 1)
			}},
	} {
		run := func() { t.Run(c.name, c.run) }
		if c.refused {
			waiting.Go(run)
		} else {
			run()
		}
	}
	waiting.Wait()
}

// run has the load take hold of a server, looks how others fare, and ends the load.
func (l *load) run(t *testing.T) {
	x := mustInsider(t, true)
	other := x.mustUser(t, tenantB, "b@example.com")
	x.mustUpload(t, other, oneValue)
	ctx, end := context.WithCancel(context.Background())
	defer end()
	var all []*greedy
	for _, tenant := range l.greedy {
		g := &greedy{insider: x, tenant: tenant, ctx: ctx}
		g.key = x.mustUser(t, tenant, "greedy@example.com")
		g.mustUploadLong(t)
		all = append(all, g)
	}
	for _, g := range all {
		l.begin(t, g)
	}
	for _, g := range all {
		waitUntil(t, "the load takes hold", func() bool {
			places, bytes := g.heldBy(g.tenant)
			return places >= l.places && bytes >= l.bytes
		})
	}
	for range *faults {
		x.checkLoad(t, all, other, l.refused)
	}
	end()
	for _, g := range all {
		for _, conn := range g.conns {
			conn.Close()
		}
		g.requests.Wait()
	}
	x.waitUntilAllIsFree(t)
	for _, g := range all {
		x.must(t, 200, "GET", "/runs", g.key, "")
	}
}

// mustUploadLong uploads the series long.
func (g *greedy) mustUploadLong(t *testing.T) {
	t.Helper()
	body := []byte("valid_time,value_key,value\n")
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 30_000 {
		body = fmt.Appendf(body, "%s,long,1\n", begin.Add(time.Duration(i)*time.Minute).Format(time.RFC3339))
	}
	g.must(t, 200, "POST", "/upload?run_start_time=2025-01-01", g.key, string(body),
		"Content-Type: text/csv")
}

// checkLoad checks, while the greedy hold what they hold, that the other tenant is served soon, and
// if so wanted that a further request of the greedy is not.
func (x insider) checkLoad(t *testing.T, all []*greedy, other string, refused bool) {
	t.Helper()
	var waiting sync.WaitGroup
	defer waiting.Wait()
	if refused {
		for _, g := range all {
			waiting.Go(func() { x.expectBusy(t, g.key) })
		}
	}
	correction := fmt.Sprintf(`{"updates":[{"valid_time":"2025-01-01","series_key":"load","value":%d}]}`,
		rand.Int())
	for _, r := range []struct{ name, method, path, body string }{
		{"a small read", "GET", aRead, ""},
		{"a bucket", "GET", aRead + "&bucket=P1D&agg=mean", ""},
		{"a lead", "GET", aRead + "&lead=PT0H", ""},
		{"a correction", "PUT", "/values", correction},
		{"an upload", "POST", "/upload", runWith("", at("2025-01-02", "1"))},
	} {
		begin := time.Now()
		answer := x.answerOf(t, r.method, r.path, other, r.body)
		took := time.Since(begin)
		t.Logf("%s: %s", r.name, took.Round(time.Millisecond))
		if !strings.HasPrefix(answer, "200 ") || took > neighbourWaits() {
			t.Errorf("%s of another tenant: %.200s after %s", r.name, answer, took)
		}
	}
}

// neighbourWaits is how long a neighbour may wait: three seconds in script/faults. Elsewhere the machine may be
// busy with other things, so there only waiting without end is wrong.
func neighbourWaits() time.Duration {
	if *faults > 1 {
		return 3 * time.Second
	}
	return 30 * time.Second
}

// expectBusy sends a read that must wait for its share, and then be told to come again.
func (x insider) expectBusy(t *testing.T, key string) {
	begin := time.Now()
	answer := x.answerOf(t, "GET", aRead, key, "")
	took := time.Since(begin)
	if !strings.HasPrefix(answer, "503 ") || took < shareWait || took > 2*shareWait+neighbourWaits() {
		t.Errorf("a further request of a greedy tenant: %.200s after %s", answer, took)
	}
}

// peak is the most memory that the program has had at a time, in MiB.
func (p *program) peak(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Skipf("how much memory a process takes cannot be read here: %v", err)
	}
	found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if found == nil {
		t.Skip("this system does not tell how much memory a process took at most")
	}
	kilobytes, _ := strconv.Atoi(string(found[1]))
	return kilobytes >> 10
}

const mostMemory = 600 // MiB

// attack is what hostile clients of two tenants send, all at once.
type attack struct {
	name    string
	prepare func(t *testing.T, h *hostile) // or nil
	attack  func(t *testing.T, h *hostile)
}

// hostile are clients that mean harm.
type hostile struct {
	*testServer
	keys []string // of the tenants

	mu       sync.Mutex
	statuses map[int]int // how many answers there were of each
}

// send sends one request and counts its answer. Only some answers are right.
func (h *hostile) send(t *testing.T, i int, method, path, body string, header ...string) {
	resp, text, err := h.do(method, path, h.keys[i%len(h.keys)], body, header...)
	if err != nil {
		t.Logf("%s %s: %v", method, path, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.statuses[resp.StatusCode]++
	switch resp.StatusCode {
	case 200, 413, 422, 503:
	default:
		t.Errorf("%s %s: %d %.300s", method, path, resp.StatusCode, text)
	}
}

// sendAll sends one request many times at once: 6 times, or with -faults raised 16 times.
func (h *hostile) sendAll(t *testing.T, method, path, body string, header ...string) {
	together(min(5+*faults, 16), func(i int) { h.send(t, i, method, path, body, header...) })
}

// longElements are requests in which one element of the body is nearly as long as the body may be.
func longElements() []requestCase {
	long := strings.Repeat("x", maxBody-1000)
	digits, spaces := strings.ReplaceAll(long, "x", "1"), strings.ReplaceAll(long, "x", " ")
	row := func(members string) string {
		return runWith("", `{"valid_time":"2025-01-01",`+members+`}`)
	}
	note := `{"updates":[{"valid_time":"2025-01-01","series_key":"x","annotation":"` + long + `"}]}`
	return []requestCase{
		{name: "a member's name", method: "POST", path: "/upload", body: `{"` + long + `":1}`},
		{name: "a value_key", method: "POST", path: "/upload",
			body: row(`"value":1,"value_key":"` + long + `"`)},
		{name: "a number", method: "POST", path: "/upload", body: row(`"value_key":"x","value":` + digits)},
		{name: "white space", method: "POST", path: "/upload",
			body: row(`"value_key":"x","value":1` + spaces)},
		{name: "a series' name", method: "POST", path: "/series", body: `{"name":"` + long + `"}`},
		{name: "an annotation", method: "PUT", path: "/values", body: note},
	}
}

const (
	csvUpload = "/upload?run_start_time=2025-01-01"
	isCSV     = "Content-Type: text/csv"
	isGzip    = "Content-Encoding: gzip"
)

func attacks() []attack {
	return []attack{
		{"elements of 64 MiB", nil, func(t *testing.T, h *hostile) {
			for _, c := range longElements() {
				h.sendAll(t, c.method, c.path, gzipped(c.body), isGzip)
				if *faults > 1 {
					h.sendAll(t, c.method, c.path, c.body)
				}
			}
		}},
		{"run_params that could expand", func(t *testing.T, h *hostile) {
			numbers := strings.Repeat("1e131071,", (maxObject-20)/len("1e131071,"))
			params := `"run_params":{"a":[` + strings.TrimSuffix(numbers, ",") + `]},`
			h.sendAll(t, "POST", "/upload", runWith(params, at("2025-01-01", "1")))
		}, func(t *testing.T, h *hostile) {
			h.sendAll(t, "GET", "/runs", "")
		}},
		{"lists of 23 MB that nobody reads", func(t *testing.T, h *hostile) {
			for _, tenant := range hostileTenants {
				mustExec(t, h.db, `INSERT INTO series_table (tenant_id, series_key, unit)
					SELECT $1, repeat('long ', 80) || i, 'MW' FROM generate_series(1, 50000) AS i`, tenant)
			}
		}, func(t *testing.T, h *hostile) {
			h.connect(t, 40, func(key string) string { return rawGet("/list_timeseries", key) })
		}},
		{"stalled gzip bodies", nil, func(t *testing.T, h *hostile) {
			row := rowOf("stalled") + ","
			packed := gzipped(`{"value_rows":[` + strings.Repeat(row, (1<<20)/len(row)))
			h.connect(t, 300, func(key string) string {
				return fmt.Sprintf("POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n"+
					"Content-Type: application/json\r\n%s\r\nContent-Length: %d\r\n\r\n%s",
					key, isGzip, len(packed)+1, packed)
			})
		}},
		{"as many series as there may be, with long keys", nil, func(t *testing.T, h *hostile) {
			body := []byte("valid_time,value_key,value\n")
			for i := range maxSeries {
				body = fmt.Appendf(body, "2025-01-01,%0480d,1\n", i)
			}
			h.sendAll(t, "POST", csvUpload, gzipped(string(body)), isCSV, isGzip)
		}},
		{"keys and tags that JSON or SQL may write longer", func(t *testing.T, h *hostile) {
			h.mustUploadEnds(t)
		}, func(t *testing.T, h *hostile) {
			body := []byte("valid_time,value_key,value\n")
			for i := range 23_000 {
				body = fmt.Appendf(body, "2025-01-01,%s%05d,1\n", strings.Repeat("<", 490), i)
			}
			h.sendAll(t, "POST", csvUpload, gzipped(string(body)), isCSV, isGzip)
			h.sendAll(t, "PUT", "/values", gzipped(strings.ReplaceAll(longTags(0), "000", `\\\"<`)), isGzip)
		}},
		{"as many rows as there may be", nil, func(t *testing.T, h *hostile) {
			body := []byte("valid_time,value_key,value\n")
			begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
			for i := range maxRows {
				body = begin.Add(time.Duration(i)*time.Minute).AppendFormat(body, time.RFC3339)
				body = append(body, ",a,1\n"...)
			}
			h.sendAll(t, "POST", csvUpload, gzipped(string(body)), isCSV, isGzip)
		}},
		{"corrections with long tags", func(t *testing.T, h *hostile) {
			h.mustUploadEnds(t)
		}, func(t *testing.T, h *hostile) {
			h.sendAll(t, "PUT", "/values", gzipped(longTags(0)), isGzip)
		}},
		{"reads of values with long tags", func(t *testing.T, h *hostile) {
			h.mustUploadEnds(t)
			for round := range 4 {
				for i := range h.keys {
					h.send(t, i, "PUT", "/values", longTags(round))
				}
			}
		}, func(t *testing.T, h *hostile) {
			h.sendAll(t, "GET", "/values?all_versions=true&limit=1", "")
		}},
		{"runs that begin at one time", func(t *testing.T, h *hostile) {
			for _, key := range h.keys {
				h.mustBusySeries(t, key, 400)
			}
		}, func(t *testing.T, h *hostile) {
			h.sendAll(t, "GET", "/values?limit=1", "")
		}},
	}
}

const manyEnds = 200

// endOf is the valid_time_end of one of the values that mustUploadEnds uploads.
func endOf(i int) string {
	return time.Date(2025, 1, 2, 0, i, 0, 0, time.UTC).Format(time.RFC3339)
}

// mustUploadEnds uploads values that differ in their valid_time_end alone.
func (h *hostile) mustUploadEnds(t *testing.T) {
	t.Helper()
	var rows []string
	for i := range manyEnds {
		rows = append(rows, at("2025-01-01", "1", `,"valid_time_end":"`+endOf(i)+`"`))
	}
	for _, key := range h.keys {
		h.must(t, 200, "POST", "/upload", key, runWith("", rows...))
	}
}

// longTags corrects these values: each gets tags of some 50 KB.
func longTags(round int) string {
	var tags, updates []string
	for i := range maxTags {
		tags = append(tags, fmt.Sprintf(`"%0480d %d"`, i, round))
	}
	for i := range manyEnds {
		updates = append(updates, fmt.Sprintf(
			`{"valid_time":"2025-01-01","valid_time_end":%q,"series_key":"load","value":%d,"tags":[%s]}`,
			endOf(i), round, strings.Join(tags, ",")))
	}
	return `{"updates":[` + strings.Join(updates, ",") + `]}`
}

// connect opens connections on which it says something and reads nothing, for two seconds.
func (h *hostile) connect(t *testing.T, n int, request func(key string) string) {
	t.Helper()
	for i := range n {
		conn := h.mustDial(t)
		defer conn.Close()
		conn.SetWriteDeadline(time.Now().Add(time.Second)) // the server may not read it
		io.WriteString(conn, request(h.keys[i%len(h.keys)]))
		time.Sleep(5 * time.Millisecond) // it is about what is held, not about a burst
	}
	time.Sleep(2 * time.Second) // how much the server takes meanwhile is what is measured
}

var hostileTenants = []string{tenantA, nobody}

func TestFaultMemoryStaysBounded(t *testing.T) { // S34
	t.Parallel()
	for _, a := range attacks() {
		t.Run(a.name, a.run)
	}
}

// run attacks a server, while a good client goes on.
func (a *attack) run(t *testing.T) {
	t.Parallel() // each has a server of its own
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	h := &hostile{testServer: serverAt(t, dsn, port), statuses: map[int]int{}}
	for _, tenant := range hostileTenants {
		h.keys = append(h.keys, h.mustUser(t, tenant, "hostile@example.com"))
	}
	good := h.mustUser(t, tenantB, "good@example.com")
	if a.prepare != nil {
		p := mustProgram(t, asAppRole(dsn), port)
		a.prepare(t, h)
		p.kill()
		clear(h.statuses)
	}
	p := mustProgram(t, asAppRole(dsn), port)
	ctx, end := context.WithCancel(context.Background())
	var beside sync.WaitGroup
	beside.Go(func() {
		for ctx.Err() == nil {
			h.expectOK(t, "GET", "/values", good, "")
			time.Sleep(50 * time.Millisecond) // the pace of a good client
		}
	})
	for range *faults {
		a.attack(t, h)
	}
	end()
	beside.Wait()
	peak := p.peak(t)
	t.Logf("%d MiB at most; answers by status: %v", peak, h.statuses)
	if peak >= mostMemory {
		t.Errorf("the server took %d MiB", peak)
	}
}

// mustFill stores series and runs of tenantA: each run with run_params of 2 KB.
func (s *testServer) mustFill(t *testing.T, series, runs int) {
	t.Helper()
	mustExec(t, s.db, `INSERT INTO series_table (tenant_id, series_key, unit)
		SELECT $1, repeat('long ', 20) || i, 'MW' FROM generate_series(1, $2) AS i
		ON CONFLICT DO NOTHING`, tenantA, series)
	mustExec(t, s.db, `INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time,
		       known_time, run_params, rows_inserted, request_digest)
		SELECT $1, gen_random_uuid(), 'w', now(), now(),
		       json_build_object('long', repeat('long ', 400)), 0, sha256('')
		FROM generate_series(1, $2)`, tenantA, runs)
}

func TestListsStreamWithoutGrowingMemory(t *testing.T) { // S35
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	s := serverAt(t, dsn, port)
	key := s.mustUser(t, tenantA, "a@example.com")
	// What answers hold shows where little garbage gathers beside it.
	p := mustProgramWith(t, []string{"GOGC=100"}, asAppRole(dsn), port)
	measure := func(series, runs int) (peak int) {
		list := mustDecode[map[string]any](t, s.must(t, 200, "GET", "/list_timeseries", key, ""))
		shown := mustDecode[struct {
			Count int
			Data  []any
		}](t, s.must(t, 200, "GET", "/runs?limit=10000", key, ""))
		if len(list) != series || len(shown.Data) != runs || shown.Count != runs {
			t.Errorf("%d series and %d runs, count %d; want %d and %d",
				len(list), len(shown.Data), shown.Count, series, runs)
		}
		return p.peak(t)
	}
	s.mustFill(t, 10_000, 1000)
	before := measure(10_000, 1000)
	s.mustFill(t, 100_000, 9000)
	after := measure(100_000, 10_000)
	t.Logf("%d MiB, then %d MiB", before, after)
	if after > before+8 { // the answers grow by 20 MB each
		t.Errorf("the server took %d MiB for a tenth of the lists, and %d MiB for all", before, after)
	}
}

// A request that was refused holds nothing while its client goes on sending, however slowly.
func TestRefusedRequestsHoldNothing(t *testing.T) { // S33
	t.Parallel()
	x := mustInsider(t, true)
	key := x.mustUser(t, tenantA, "a@example.com")
	x.mustUpload(t, key, oneValue)
	g := &greedy{insider: x, tenant: tenantA, key: key, ctx: t.Context()}
	const stalled = "X-API-Key: %s\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n%s"
	for range 2 * tenantPlaces {
		fmt.Fprintf(g.mustConnect(t, "http/1.1"), "PUT /values HTTP/1.1\r\n"+stalled, key, `{"nope":1}`)
		fmt.Fprintf(g.mustConnect(t, "http/1.1"), "GET /values?lead=1h&nope=1 HTTP/1.1\r\n"+stalled, key, "{")
	}
	waitUntil(t, "all are refused", func() bool { // when they have been waited for
		x.must(t, 200, "GET", "/values?lead=PT0H", key, "")
		x.must(t, 200, "PUT", "/values", key, update(`"value":5`))
		return strings.Count(x.log.String(), "status=422") == 4*tenantPlaces
	})
	x.waitUntilAllIsFree(t)
}

func TestWhoLeavesWaitsNoMore(t *testing.T) { // S33
	t.Parallel()
	x := mustInsider(t, true)
	key := x.mustUser(t, tenantA, "a@example.com")
	unlock := x.mustLock(t, "values_table")
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	working := &greedy{insider: x, key: key, ctx: ctx}
	working.repeat(tenantPlaces, "GET", "/values", "")
	x.waitForLockWaits(t, "values_table", tenantPlaces)
	leaves, leave := context.WithCancel(ctx)
	waiting := &greedy{insider: x, key: key, ctx: leaves}
	waiting.repeat(1, "GET", "/values", "")
	requests := func(n int64) func() bool {
		return func() bool {
			_, bytes := x.heldBy(tenantA)
			return bytes == n*requestBytes
		}
	}
	waitUntil(t, "one more request is there", requests(tenantPlaces+1))
	begin := time.Now()
	leave()
	waitUntil(t, "it is gone", requests(tenantPlaces))
	if took := time.Since(begin); took > shareWait/2 {
		t.Errorf("a request whose client has left goes on to wait for %s", took)
	}
	hangUp()
	unlock()
	working.requests.Wait()
	waiting.requests.Wait()
	x.waitUntilAllIsFree(t)
}

func TestInOpenModeOneTenantMayHaveEveryPlace(t *testing.T) { // S33
	t.Parallel()
	x := mustInsider(t, false)
	unlock := x.mustLock(t, "values_table")
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	everyone := &greedy{insider: x, ctx: ctx}
	everyone.repeat(totalPlaces+1, "GET", "/values", "")
	x.waitForLockWaits(t, "values_table", totalPlaces)
	if places, _ := x.heldBy(openTenant); places != totalPlaces {
		t.Errorf("%d places are taken, want %d", places, totalPlaces)
	}
	hangUp()
	unlock()
	everyone.requests.Wait()
	x.waitUntilAllIsFree(t)
}

func TestTenantAloneWaitsRatherThanFails(t *testing.T) { // S33
	t.Parallel()
	x := mustInsider(t, true)
	key := x.mustUser(t, tenantA, "a@example.com")
	x.mustBusySeries(t, key, 50)
	jsonRows, csvRows := uploadBodies(100_000)
	corrections := manyCorrections()
	for _, c := range []struct {
		clients                        int
		name, method, path, body, kind string
	}{
		{8, "uploads of JSON", "POST", "/upload", jsonRows, "application/json"},
		{8, "uploads of CSV", "POST", csvUpload, csvRows, "text/csv"},
		{5, "corrections", "PUT", "/values", corrections, "application/json"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if *faults == 1 {
				c.clients /= 2 // which fit into half of a share, so that a busy machine fails none
			}
			begin := time.Now()
			together(c.clients, func(i int) {
				resp, text, err := x.do(c.method, c.path, key, c.body, "Content-Type: "+c.kind)
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("client %d: %v %v %.300s", i, err, resp, text)
				}
			})
			t.Logf("%d at once took %s", c.clients, time.Since(begin).Round(time.Millisecond))
			x.waitUntilAllIsFree(t)
		})
	}
}

func TestFaultConnectionThatIsNotReadyAfterAnErrorIsDropped(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	defer theirs.Close()
	c := &boundedConn{Conn: ours, timeout: time.Minute}
	go theirs.Write([]byte("E\x00\x00\x00\x1bSFEHLER\x00VERROR\x00C57014\x00\x00"))
	if _, err := c.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_, err := c.Read(make([]byte, 100))
	if err == nil || time.Since(begin) > 10*readyTimeout {
		t.Errorf("after the error it waited %s: %v", time.Since(begin), err)
	}
	if _, err := c.Write([]byte("Q")); err == nil {
		t.Error("it is still used")
	}
}

// ---- Nodes of Citus are killed, stopped, frozen, or exchange shards. script/citus runs these, on a cluster of its own

// citusNode is a node that script/citus started. It runs as another user, so processes are found by their parent.
type citusNode string

func (n citusNode) processes(t *testing.T) (pids []int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(citusFolder, string(n), "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(text), "\n")
	postmaster, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	pids = []int{postmaster}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range all {
		stat, _ := os.ReadFile(file) // pid (name) state parent …
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		if len(fields) > 1 && fields[1] == first {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// processorTime is what the node's processes have used, in milliseconds.
func (n citusNode) processorTime(t *testing.T) (sum float64) {
	t.Helper()
	for _, pid := range n.processes(t) {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		if len(fields) > 12 { // the 14th and 15th of all: user and system time, in hundredths of a second
			user, _ := strconv.ParseFloat(fields[11], 64)
			system, _ := strconv.ParseFloat(fields[12], 64)
			sum += 10 * (user + system)
		}
	}
	return sum
}

// signal is sent to the postmaster first, which then starts no more processes.
func (n citusNode) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	for _, pid := range n.processes(t) {
		syscall.Kill(pid, sig)
	}
}

func (n citusNode) mustStart(t *testing.T) {
	t.Helper()
	waitUntil(t, string(n)+" starts", func() bool { return exec.Command("script/citus", "start", string(n)).Run() == nil })
}

// citusTenant is a tenant of whom it is known on which worker it lives.
type citusTenant struct{ id, key string }

// mustFourTenants makes two tenants on each worker.
func (s *testServer) mustFourTenants(t *testing.T) (tenants []citusTenant) {
	t.Helper()
	for i := range 4 {
		tenants = append(tenants, s.mustTenantOn(t, citusNode(citusWorkers[i%2])))
	}
	return tenants
}

// mustTenantOn makes a tenant that lives on the worker.
func (s *testServer) mustTenantOn(t *testing.T, worker citusNode) citusTenant {
	t.Helper()
	for {
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", rand.Uint32(), rand.Int63n(1<<47))
		port := mustQuery(t, s.db, `SELECT nodeport FROM pg_dist_placement JOIN pg_dist_node USING (groupid)
			WHERE shardid = get_shard_id_for_distribution_column('runs_table', $1::uuid)`, id)
		if port == citusPort(t, string(worker)) {
			x := citusTenant{id, s.mustUser(t, id, "a@example.com")}
			body := []byte("valid_time,value_key,value\n")
			for i := range 3600 {
				body = fmt.Appendf(body, "%s,load,1\n", citusTime(i))
			}
			s.must(t, 200, "POST", "/upload?run_start_time=2025-01-01", x.key, string(body), "Content-Type: text/csv")
			return x
		}
	}
}

func citusTime(second int) string {
	return time.Date(2025, 1, 1, 0, 0, second, 0, time.UTC).Format(time.RFC3339)
}

// citusPromises are what was acknowledged to clients.
type citusPromises struct {
	mu       sync.Mutex
	runs     map[string]bool
	notes    map[string]bool
	statuses map[int]int
	worst    time.Duration // of a request that got 200
	slow     time.Duration // of one that did not
}

// send counts an answer.
func (p *citusPromises) send(t *testing.T, s *testServer, method, path, key, body string) (int, string) {
	begin := time.Now()
	resp, text, err := s.do(method, path, key, body)
	took := time.Since(begin)
	if err != nil && method != "GET" { // a long answer may break off, so that the client knows
		t.Errorf("%s %s: %v", method, path, err)
	}
	if err != nil {
		return 0, ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.statuses[resp.StatusCode]++
	switch {
	case resp.StatusCode == 200:
		p.worst = max(p.worst, took)
	case resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "":
		t.Errorf("%s %s: %d %s", method, path, resp.StatusCode, text)
	default:
		p.slow = max(p.slow, took)
	}
	return resp.StatusCode, text
}

// mustShow reads until it is answered, and fails unless the answer has so many times what was written.
func (p *citusPromises) mustShow(t *testing.T, s *testServer, key, path, what string, times int) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		status, text := p.send(t, s, "GET", path, key, "")
		if status != 200 {
			continue
		}
		if found := strings.Count(text, what); found != times {
			t.Errorf("what was acknowledged shows %d times, want %d: %s in %.300s", found, times, what, text)
		}
		return
	}
	t.Errorf("%s is not answered for a minute; the end of timedb's log: %s", path, tail(s.log))
}

// write uploads a run or corrects a value, and reads it when that was acknowledged.
func (p *citusPromises) write(t *testing.T, s *testServer, x citusTenant, client, n int) {
	if n%2 == 0 {
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", rand.Uint32(), rand.Int63n(1<<47))
		body := fmt.Sprintf(`{"run_id":%q,"run_start_time":"2025-01-01","value_rows":[{"valid_time":"2025-02-01",
			"value_key":"s%d","value":7},{"valid_time":"2025-02-02","value_key":"s%[2]d","value":7}]}`, id, client)
		if status, _ := p.send(t, s, "POST", "/upload", x.key, body); status == 200 {
			p.mu.Lock()
			p.runs[id] = true
			p.mu.Unlock()
			p.mustShow(t, s, x.key, fmt.Sprintf("/values?series_key=s%d&run_id=%s", client, id), `"value":7.0`, 2)
		}
		return
	}
	second := n / 20
	note := fmt.Sprintf("%s %d %d %x", x.id, client, n, rand.Int63())
	body := fmt.Sprintf(`{"updates":[{"series_key":"load","valid_time":%q,"value":%d,"annotation":%q}]}`,
		citusTime(second), 1000*n+client, note)
	status, _ := p.send(t, s, "PUT", "/values", x.key, body)
	p.mu.Lock()
	p.notes[note] = status == 200
	p.mu.Unlock()
	if status == 200 {
		p.mustShow(t, s, x.key, "/values?all_versions=true&series_key=load&start_valid="+citusTime(second)+
			"&end_valid="+citusTime(second+1), strconv.Quote(note), 1)
	}
}

// check compares what was promised with what is stored.
func (p *citusPromises) check(t *testing.T, s *testServer) {
	t.Helper()
	t.Logf("answers %v; acknowledged: %d runs, %d corrections tried; slowest 200 %s, slowest 503 %s",
		p.statuses, len(p.runs), len(p.notes), p.worst, p.slow)
	whole := mustDecode[map[string]bool](t, mustQuery(t, s.db, `SELECT json_object_agg(run_id, n = rows_inserted) FROM (
		SELECT r.run_id, r.rows_inserted, coalesce(sum(cardinality(v."values")), 0) AS n
		FROM runs_table r LEFT JOIN values_table v ON v.tenant_id = r.tenant_id AND v.run_id = r.run_id AND v.version = 1
		GROUP BY r.tenant_id, r.run_id, r.rows_inserted) AS t`))
	for id, is := range whole {
		if !is {
			t.Errorf("run %s is stored in part", id)
		}
	}
	for id := range p.runs {
		if !whole[id] {
			t.Errorf("the acknowledged run %s is not there", id)
		}
	}
	stored := mustDecode[map[string]int](t, mustQuery(t, s.db, `SELECT coalesce(json_object_agg(annotation, n), '{}')
		FROM (SELECT annotation, count(*) AS n FROM values_table WHERE annotation IS NOT NULL GROUP BY 1) AS t`))
	for note, acknowledged := range p.notes {
		if stored[note] > 1 || acknowledged && stored[note] != 1 {
			t.Errorf("the correction %q, acknowledged: %v, is stored %d times", note, acknowledged, stored[note])
		}
	}
	gaps := mustQuery(t, s.db, `SELECT count(*) FROM (SELECT FROM values_table WHERE version > 1
		GROUP BY tenant_id, series_number, run_id, valid_from HAVING count(*) <> max(version) - 1
		OR count(DISTINCT version) <> count(*)) AS g`)
	if gaps != "0" {
		t.Errorf("the versions of %s values do not count from 2 on", gaps)
	}
	for _, worker := range citusWorkers {
		in2 := mustQuery(t, mustOpen(t, citusURL(t, worker, "")), `SELECT count(*) FROM pg_prepared_xacts`)
		if in2 != "0" {
			t.Errorf("%s has %s transactions in two phases", worker, in2)
		}
	}
	if strings.Contains(s.log.String(), "status=500") {
		t.Errorf("there was a 500: %s", tail(s.log))
	}
}

// mustWork has clients of each tenant write until disturb returns, checks what they were promised, and that reads as of
// moments in between repeat.
func mustWork(t *testing.T, s *testServer, tenants []citusTenant, disturb func(p *citusPromises)) {
	t.Helper()
	p := &citusPromises{runs: map[string]bool{}, notes: map[string]bool{}, statuses: map[int]int{}}
	ctx, stop := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	var mu sync.Mutex
	looks := map[string][2]string{} // of a path: the key and the answer
	for _, x := range tenants {
		for client := range 3 {
			clients.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					p.write(t, s, x, client, n)
				}
			})
		}
		clients.Go(func() {
			for ctx.Err() == nil {
				now := mustQuery(t, s.db, `SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`)
				time.Sleep(8 * time.Second) // the writes of that moment have ended
				path := "/values?all_versions=true&as_of=" + now
				if status, text := p.send(t, s, "GET", path, x.key, ""); status == 200 {
					mu.Lock()
					looks[path] = [2]string{x.key, text}
					mu.Unlock()
				}
			}
		})
	}
	disturb(p)
	stop()
	clients.Wait()
	p.check(t, s)
	for path, look := range looks {
		if again := s.must(t, 200, "GET", path, look[0], ""); again != look[1] {
			t.Errorf("%s does not repeat", path)
		}
	}
	t.Logf("%d reads as of a moment were repeated", len(looks))
}

func mustCitus(t *testing.T) *testServer {
	t.Helper()
	if !onCitus() {
		t.Skip("script/citus test runs this, on Citus")
	}
	return mustServer(t)
}

// Tables that hold data are distributed, and then upgraded from version 3, in which two corrections had one version.
func TestCitusTakesDataAlong(t *testing.T) {
	if !onCitus() {
		t.Skip("script/citus test runs this, on Citus")
	}
	dsn := mustDatabase(t)
	local := strings.Replace(dsn, "127.0.0.1", "localhost", 1) // for which the harness adds no --citus
	mustRun(t, 0, local, "", "create", "tables", "--with-users", "-y", "--app-role", appRole.name)
	s := mustAPI(t, local)
	keys := []string{s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantB, "a@example.com")}
	for _, key := range keys {
		s.must(t, 200, "POST", "/upload", key, oneValue)
		for _, value := range []string{"2", "3", "4"} {
			s.must(t, 200, "PUT", "/values", key, `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":`+value+`}]}`)
		}
	}
	read := func() (all string) {
		s := mustAPI(t, dsn)
		defer s.stop()
		for _, key := range keys {
			all += s.must(t, 200, "GET", "/values?all_versions=true", key, "") + s.must(t, 200, "GET", "/corrections", key, "")
		}
		return all
	}
	before := read()
	s.stop()
	for range 2 {
		mustCreateTables(t, dsn, "--with-users")
		if left := mustQuery(t, s.db, `SELECT pg_relation_size('values_table') + pg_relation_size('runs_table')`); left != "0" {
			t.Errorf("%s bytes are left on the coordinator", left)
		}
		if after := read(); after != before {
			t.Errorf("before %s, after %s", before, after)
		}
	}
	mustExec(t, s.db, `DROP INDEX corrections_by_version`)
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS 'timedb schema 3'`)
	mustExec(t, s.db, `UPDATE values_table SET version = 3 WHERE version = 4`)
	mustCreateTables(t, dsn)
	if after := read(); after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	_, err := s.db.Exec(`UPDATE values_table SET version = 3 WHERE version = 4`)
	if sqlState(err) != uniqueViolation {
		t.Errorf("two corrections get one version: %v", err)
	}
}

func TestCitusKilledWorkersLoseNothing(t *testing.T) {
	s := mustCitus(t)
	tenants := s.mustFourTenants(t)
	mustWork(t, s, tenants, func(p *citusPromises) {
		for kill := range 5 * *faults {
			sleepAtRandom(200, 800)
			worker := citusNode(citusWorkers[kill%2])
			worker.signal(t, syscall.SIGKILL)
			sleepAtRandom(0, 300)
			worker.mustStart(t)
			p.mustShow(t, s, tenants[kill%2].key, "/values?series_key=load&end_valid="+citusTime(1), `"value"`, 1)
		}
	})
}

func TestCitusWorkerThatIsDownHurtsItsOwnTenantsAlone(t *testing.T) {
	s := mustCitus(t)
	down, up := citusNode("worker2"), citusNode("worker1")
	hurt := []citusTenant{s.mustTenantOn(t, down), s.mustTenantOn(t, down), s.mustTenantOn(t, down)}
	others := []citusTenant{s.mustTenantOn(t, up), s.mustTenantOn(t, up)}
	for _, c := range []struct {
		name        string
		fault, mend func()
	}{
		{"stopped", func() { down.signal(t, syscall.SIGKILL) }, func() { down.mustStart(t) }},
		{"frozen", func() { down.signal(t, syscall.SIGSTOP) }, func() { down.signal(t, syscall.SIGCONT) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			own := &citusPromises{runs: map[string]bool{}, notes: map[string]bool{}, statuses: map[int]int{}}
			rest := &citusPromises{runs: map[string]bool{}, notes: map[string]bool{}, statuses: map[int]int{}}
			ctx, stop := context.WithCancel(context.Background())
			var clients sync.WaitGroup
			begin := func(p *citusPromises, tenants []citusTenant, each int) {
				for _, x := range tenants {
					for client := range each {
						clients.Go(func() {
							for n := rand.Intn(1000); ctx.Err() == nil; n++ {
								if status, _ := p.send(t, s, "GET", aRead+"&end_valid="+citusTime(9), x.key, ""); status == 200 {
									p.write(t, s, x, client, n)
								}
							}
						})
					}
				}
			}
			begin(own, hurt, 10)
			begin(rest, others, 1)
			time.Sleep(3 * time.Second)
			c.fault()
			t.Cleanup(func() { down.signal(t, syscall.SIGCONT) }) // whatever happens
			time.Sleep(20 * time.Second)
			c.mend()
			mended := time.Now()
			own.mustShow(t, s, hurt[0].key, "/values?series_key=load&end_valid="+citusTime(1), `"value"`, 1)
			t.Logf("served again after %s", time.Since(mended))
			stop()
			clients.Wait()
			// Until the node is known to be down, its tenants may hold all places for longer than others wait.
			if rest.statuses[503] > rest.statuses[200]/100 || rest.worst > 5*time.Second {
				t.Errorf("the others got %v, the slowest after %s", rest.statuses, rest.worst)
			}
			if own.statuses[503] == 0 || own.slow > 6*time.Second {
				t.Errorf("its own tenants got %v, the slowest 503 after %s", own.statuses, own.slow)
			}
			t.Logf("the others: %v, slowest %s", rest.statuses, rest.worst)
			own.check(t, s)
		})
	}
}

func TestCitusShardsMoveUnderLoad(t *testing.T) {
	s := mustCitus(t)
	tenants := s.mustFourTenants(t)
	mustWork(t, s, tenants, func(p *citusPromises) {
		for move := range *faults {
			sleepAtRandom(500, 1000)
			mustExec(t, s.db, `SELECT citus_move_shard_placement(shardid, nodename, nodeport, '127.0.0.1', CASE nodeport
				WHEN $2::integer THEN $3::integer ELSE $2 END)
				FROM pg_dist_placement JOIN pg_dist_node USING (groupid)
				WHERE shardid = get_shard_id_for_distribution_column('runs_table', $1::uuid)`,
				tenants[move%4].id, citusPort(t, "worker1"), citusPort(t, "worker2"))
		}
		if p.statuses[503] > 0 {
			t.Errorf("while shards move: %v", p.statuses)
		}
	})
}

// ---- Citus answers as plain PostgreSQL does

var (
	citusUUID  = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	citusClock = regexp.MustCompile(`"(change_time|inserted_at|withdrawn_at|last_change_time)":"[^"]*"|"value_id":\d+`)
)

// comparable is an answer without what clocks and counters made, and with each id by the place of its first appearance.
func comparable(ids map[string]int, text string) string {
	text = citusUUID.ReplaceAllStringFunc(text, func(id string) string {
		if _, known := ids[id]; !known {
			ids[id] = len(ids)
		}
		return fmt.Sprint("id ", ids[id])
	})
	return citusClock.ReplaceAllString(text, "$1")
}

// citusRequest is a random request.
func citusRequest(rng *rand.Rand) (method, path, body string) {
	series := func() string { return pick(rng, "a", "b", "c", "d e", "É", "nothing") }
	when := func() string {
		return time.Date(2025, 1, 1+rng.Intn(40), rng.Intn(3), 0, 0, 0, time.UTC).Format(time.RFC3339)
	}
	run := func() string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", rng.Intn(60)) }
	known := func() string { return fmt.Sprintf("2025-01-%02dT00:00:00Z", 1+rng.Intn(9)) }
	value := func() string { return pick(rng, "null", "1", "-0.0", "2.5", "1e300") }
	switch rng.Intn(10) {
	case 0, 1, 2:
		var rows []string
		for range 1 + rng.Intn(20) {
			end := ""
			if rng.Intn(4) == 0 {
				end = `"valid_time_end":"2025-03-01",`
			}
			rows = append(rows, fmt.Sprintf(`{"valid_time":%q,%s"value_key":%q,"value":%s}`, when(), end, series(), value()))
		}
		return "POST", "/upload", fmt.Sprintf(`{"run_id":%q,"workflow_id":%q,"known_time":%q,"run_start_time":"2025-01-01",
			"value_rows":[%s]}`, run(), series(), known(), strings.Join(rows, ","))
	case 3, 4:
		more := pick(rng, "", `,"annotation":"x"`, `,"tags":["u","v"]`, `,"known_time":"`+known()+`"`, `,"run_id":"`+run()+`"`)
		update := fmt.Sprintf(`{"series_key":%q,"valid_time":%q,"value":%s%s}`, series(), when(), value(), more)
		return "PUT", "/values", `{"updates":[` + update + `]}` // one: several have one change_time, and no order
	case 5:
		if rng.Intn(4) == 0 {
			return "POST", "/runs/" + run() + "/withdraw", `{"annotation":"wrong"}`
		}
		return "POST", "/series", fmt.Sprintf(`{"series_key":%q,"unit":%q}`, series(), pick(rng, "MW", "dimensionless"))
	case 6:
		return "GET", pick(rng, "/runs", "/corrections", "/list_timeseries", "/list_timeseries?stats=true",
			"/runs?series_key="+url.QueryEscape(series()), "/runs?workflow_id="+url.QueryEscape(series())), ""
	}
	q := url.Values{}
	add := func(name, value string) {
		if rng.Intn(4) == 0 {
			q.Add(name, value)
		}
	}
	for range 2 {
		add("series_key", series())
	}
	add("match", pick(rng, "*", "?", "d*"))
	add("start_valid", when())
	add("end_valid", when())
	add("start_known", known())
	add("end_known", known())
	add("run_id", run())
	add("workflow_id", series())
	add("mode", pick(rng, "flat", "overlapping"))
	add("all_versions", "true")
	add("latest", "true")
	add("lead", pick(rng, "PT6H", "P2D"))
	add("bucket", pick(rng, "P1D", "PT2H"))
	add("limit", fmt.Sprint(1+rng.Intn(20)))
	return "GET", "/values?" + q.Encode(), ""
}

// mustPlain starts the API on a plain PostgreSQL beside Citus.
func mustPlain(t *testing.T) *testServer {
	t.Helper()
	plain := mustOpen(t, os.Getenv("TEST_PLAIN_URL")+"?sslmode=disable")
	name := fmt.Sprintf("timedb_plain_%016x", rand.Uint64())
	mustExec(t, plain, "CREATE DATABASE "+name)
	t.Cleanup(func() { mustExec(t, plain, "DROP DATABASE "+name+" WITH (FORCE)") })
	u := mustParse(t, os.Getenv("TEST_PLAIN_URL"))
	u.Path = "/" + name
	u.RawQuery = "sslmode=disable"
	mustRun(t, 0, u.String(), "", "create", "tables", "--with-users", "-y")
	return mustAPIOn(t, u.String(), u.String())
}

func TestCitusAnswersAsPlainPostgreSQL(t *testing.T) {
	both := []*testServer{mustCitus(t), mustPlain(t)}
	seed := time.Now().UnixNano()
	rng := rand.New(rand.NewSource(seed))
	statuses := map[int]int{}
	for tenant := range *faults {
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", rng.Uint32(), tenant)
		keys := []string{both[0].mustUser(t, id, "a@example.com"), both[1].mustUser(t, id, "a@example.com")}
		ids := []map[string]int{{}, {}}
		for range 400 {
			method, path, body := citusRequest(rng)
			var answers [2]string
			for i, server := range both {
				resp, text, err := server.do(method, path, keys[i], body)
				if err != nil {
					t.Fatal(err)
				}
				statuses[resp.StatusCode]++
				answers[i] = fmt.Sprint(resp.StatusCode, " ", comparable(ids[i], text))
			}
			const twice = "occurs twice for series" // of several series any may be named
			if answers[0] != answers[1] && !(strings.Contains(answers[0], twice) && strings.Contains(answers[1], twice)) {
				t.Fatalf("seed %d, %s %s %s:\nCitus %s\nplain %s", seed, method, path, body, answers[0], answers[1])
			}
		}
	}
	t.Logf("answers by status, of both: %v", statuses)
}

// TestCitusCosts logs how long requests take on Citus and on plain PostgreSQL, and how many of them one coordinator serves.
func TestCitusCosts(t *testing.T) {
	both := []*testServer{mustCitus(t), mustPlain(t)}
	rows := func(n, series int) string {
		var rows []string
		for i := range n {
			rows = append(rows, fmt.Sprintf(`{"valid_time":%q,"value_key":"s%d","value":%d}`, citusTime(i/series), i%series, i))
		}
		return `{"run_start_time":"2025-01-01","value_rows":[` + strings.Join(rows, ",") + `]}`
	}
	corrections := func(n int) string {
		var updates []string
		for i := range n {
			updates = append(updates, fmt.Sprintf(`{"series_key":"s0","valid_time":%q,"value":%d}`, citusTime(i), rand.Int()))
		}
		return `{"updates":[` + strings.Join(updates, ",") + `]}`
	}
	long, wide := rows(10_000, 1), rows(1000, 1000)
	var keys [2][]string
	for i, s := range both {
		for tenant := range 8 {
			key := s.mustUser(t, fmt.Sprintf("%08x-0000-4000-8000-00000000000a", 7919*tenant), "a@example.com")
			s.must(t, 200, "POST", "/upload", key, wide)
			keys[i] = append(keys[i], key)
		}
	}
	for _, c := range []struct {
		name, method, path string
		body               func() string
	}{
		{"upload of 10,000 rows", "POST", "/upload", func() string { return long }},
		{"upload of 1,000 series", "POST", "/upload", func() string { return wide }},
		{"upload of one value", "POST", "/upload", func() string { return rows(1, 1) }},
		{"read of 24 values", "GET", "/values?series_key=s0&end_valid=" + citusTime(24), func() string { return "" }},
		{"limit=10 on 1,000 series", "GET", "/values?limit=10", func() string { return "" }},
		{"PUT of one", "PUT", "/values", func() string { return corrections(1) }},
		{"PUT of 1,000", "PUT", "/values", func() string { return corrections(1000) }},
	} {
		var median [2]time.Duration
		for i, s := range both {
			var took []time.Duration
			for range 25 {
				body := c.body()
				begin := time.Now()
				s.must(t, 200, c.method, c.path, keys[i][0], body)
				took = append(took, time.Since(begin))
			}
			slices.Sort(took)
			median[i] = took[len(took)/2]
		}
		t.Logf("%s: Citus %s, plain %s", c.name, median[0].Round(100*time.Microsecond), median[1].Round(100*time.Microsecond))
	}
	for _, kind := range []string{"reads of 24 values", "uploads of one value"} {
		var each [2]int64
		var used [3]float64 // milliseconds of processors on the coordinator and the workers, a request
		nodes := []citusNode{"coordinator", "worker1", "worker2"}
		for i, s := range both {
			var before [3]float64
			for j, n := range nodes {
				before[j] = n.processorTime(t)
			}
			end := time.Now().Add(5 * time.Second)
			var served atomic.Int64
			together(16, func(client int) {
				for time.Now().Before(end) {
					if kind == "uploads of one value" {
						s.must(t, 200, "POST", "/upload", keys[i][client%8], rows(1, 1))
					} else {
						s.must(t, 200, "GET", "/values?series_key=s1&end_valid="+citusTime(24), keys[i][client%8], "")
					}
					served.Add(1)
				}
			})
			each[i] = served.Load() / 5
			for j, n := range nodes {
				if i == 0 {
					used[j] = (n.processorTime(t) - before[j]) / float64(served.Load())
				}
			}
		}
		t.Logf("%s in a second, of 8 tenants by 16 clients: Citus %d, plain %d; processor of the coordinator %.2f ms "+
			"each, of both workers %.2f", kind, each[0], each[1], used[0], used[1]+used[2])
	}
}

// TestCitusSQLRoleOfATenant runs the policies of docs/SQL.md, which take the place of views there.
func TestCitusSQLRoleOfATenant(t *testing.T) {
	s := mustCitus(t)
	policies := mustMatch(t, "docs/SQL.md", "(?s)## On Citus.*?\n```\n(.*?)```")
	role := fmt.Sprintf("timedb_test_north_%016x", rand.Uint64())
	policies = strings.NewReplacer("north_reader", role, "timedb_api", appRole.name,
		"7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37", tenantA).Replace(policies)
	for _, tenant := range []string{tenantA, tenantB} {
		s.must(t, 200, "POST", "/upload", s.mustUser(t, tenant, "a@example.com"), oneValue)
	}
	s.db.SetMaxOpenConns(1) // for SET
	for statement := range strings.SplitSeq(policies, ";\n") {
		mustExec(t, s.db, statement)
	}
	t.Cleanup(func() { mustExec(t, s.db, "DROP OWNED BY "+role); mustExec(t, s.db, "DROP ROLE "+role) })
	mustExec(t, s.db, `ALTER ROLE `+role+` PASSWORD '`+appRole.password+`'`)
	u := mustParse(t, s.dsn)
	u.User = url.UserPassword(role, appRole.password)
	reader := mustOpen(t, u.String())
	for _, table := range []string{"runs_table", "series_table", "values_table", "current_values"} {
		seen := mustQuery(t, reader, `SELECT string_agg(DISTINCT tenant_id::text, ' ') FROM `+table)
		if seen != tenantA {
			t.Errorf("in %s the role sees the tenants %q", table, seen)
		}
		all := mustQuery(t, mustOpen(t, asAppRole(s.dsn)), `SELECT count(DISTINCT tenant_id) FROM `+table)
		if all != "2" {
			t.Errorf("in %s the API's role sees %s tenants", table, all)
		}
	}
	if _, err := reader.Exec(`SELECT FROM users_table`); err == nil {
		t.Error("the role may read users_table")
	}
}

func mustMatch(t *testing.T, file, pattern string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s has no %s", file, pattern)
	}
	return string(found[1])
}
